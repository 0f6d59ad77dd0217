from pathlib import Path

import pytest
from pydantic import SecretStr

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets


def test_without_variables_everything_has_a_default() -> None:
    settings = Settings.from_environment({"PATH": "/bin"})
    assert settings.image_schemes == ("s3",)
    assert settings.ledger == settings.broker_url


def test_variables_are_read_and_lists_are_split_at_commas() -> None:
    settings = Settings.from_environment(
        {
            "GRADCAM_IMAGE_SCHEMES": "s3, https",
            "GRADCAM_IMAGE_HOSTS": "images.example.com",
            "GRADCAM_THREADS": "3",
            "GRADCAM_WEIGHTS_DIR": "/weights",
        }
    )
    assert settings.image_schemes == ("s3", "https")
    assert settings.threads == 3
    assert settings.weights_dir == Path("/weights")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("broker_url", "redis://h:6379/0"),
        ("s3_region", "eu-west-1"),
        ("key_prefix", "a:"),
        ("status_sql_url", "postgresql://u:p@h/db"),
        ("redis_ca", __file__),
        ("log_level", "debug"),
        ("devices", "0,1"),
        ("exact_backward", "true"),
        ("image_buckets", "a,b"),
        ("networks", ""),
    ],
)
def test_whitespace_around_a_value_is_removed(name: str, value: str) -> None:
    variable = f"GRADCAM_{name.upper()}"
    settings = Settings.from_environment({variable: f" {value}\r\n"})
    assert getattr(settings, name) == getattr(Settings.from_environment({variable: value}), name)


def test_s3_keys_from_a_file_with_a_line_break_are_the_keys() -> None:
    names = ("GRADCAM_S3_ACCESS_KEY_ID", "GRADCAM_S3_SECRET_ACCESS_KEY")
    settings = Settings.from_environment(dict.fromkeys(names, "planted\n"))
    assert (settings.s3_access_key_id, settings.s3_secret_access_key.get_secret_value()) == ("planted",) * 2


def test_a_setting_with_two_values_in_upper_and_lower_case_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="GRADCAM_THREADS and GRADCAM_threads are the same setting"):
        Settings.from_environment({"GRADCAM_threads": "4", "GRADCAM_THREADS": "5"})
    assert Settings.from_environment({"GRADCAM_threads": "4", "GRADCAM_THREADS": "4"}).threads == 4


def test_what_holds_a_comma_or_a_line_break_stands_in_quotes_and_reaches_a_child_process_so() -> None:
    roots = '"/a, b",/c,"/d\ne","/f\rg"'
    settings = Settings.from_environment({"GRADCAM_IMAGE_ROOTS": roots, "GRADCAM_PRELOAD": ""})
    assert settings.image_roots == ("/a, b", "/c", "/d\ne", "/f\rg")
    assert Settings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GRADCAM_IMAGE_ROOTS": '"planted'}, "GRADCAM_IMAGE_ROOTS: it is no list with commas"),
        (
            {"GRADCAM_BROKER_URI": "x"},
            "GRADCAM_BROKER_URI: there is no such setting. Did you mean GRADCAM_BROKER_URL?",
        ),
        ({"GRADCAM_THREADS": "many"}, "GRADCAM_THREADS: 'many' was received: it should be a valid integer"),
        ({"GRADCAM_THREADS": "0"}, "GRADCAM_THREADS"),
        (
            {"GRADCAM_IMAGE_SCHEMES": "s3,ftp"},
            "GRADCAM_IMAGE_SCHEMES: 'ftp' is no scheme of an image: it must be one of s3, https, http",
        ),
        (
            {"GRADCAM_IMAGE_SCHEMES": "https"},
            "GRADCAM_IMAGE_HOSTS: it names no host, but GRADCAM_IMAGE_SCHEMES allows http or",
        ),
        (
            {"GRADCAM_IMAGE_SCHEMES": "file"},
            "GRADCAM_IMAGE_ROOTS: it names no folder, but GRADCAM_IMAGE_SCHEMES allows file",
        ),
        ({"GRADCAM_IMAGE_HOSTS": "*"}, "GRADCAM_IMAGE_HOSTS: '*' is not a host: write host, host:port"),
        ({"GRADCAM_WEBHOOK_HOSTS": "*.com"}, "GRADCAM_WEBHOOK_HOSTS: '*.com' would let in too much"),
        ({"GRADCAM_PRIVATE_NETWORKS": "10.0.0.1/8"}, "GRADCAM_PRIVATE_NETWORKS: '10.0.0.1/8' is not a netw"),
        (
            {"GRADCAM_S3_ACCESS_KEY_ID": "key"},
            "GRADCAM_S3_SECRET_ACCESS_KEY: it and GRADCAM_S3_ACCESS_KEY_ID must",
        ),
        ({"GRADCAM_S3_SECRET_ACCESS_KEY": "planted"}, "GRADCAM_S3_SECRET_ACCESS_KEY: it and GRADCAM_S3_ACC"),
        ({"GRADCAM_OUTPUT": "results"}, "GRADCAM_OUTPUT: 'results' must look like s3://bucket/prefix"),
        ({"GRADCAM_OUTPUT": "s3://"}, "must look like s3://bucket/prefix"),
        (
            {"GRADCAM_BROKER_URL": "foo"},
            "GRADCAM_BROKER_URL: '...' has no scheme: it must look like redis://host:6379/0",
        ),
        ({"GRADCAM_BROKER_URL": ""}, "GRADCAM_BROKER_URL: '' has no scheme"),
        (
            {"GRADCAM_BROKER_URL": "http://h/0"},
            "'http://h/0' has another scheme than redis or rediss or sent",
        ),
        (
            {"GRADCAM_BROKER_URL": "redis://u:planted@host:port/0"},
            "'redis://...' has a port that is no number",
        ),
        ({"GRADCAM_BROKER_URL": "redis://h:0/0"}, "'redis://h:0/0' has a port that is no number from 1 to"),
        ({"GRADCAM_BROKER_URL": "redis:///0"}, "'redis:///0' names no host: it must look like redis://host"),
        ({"GRADCAM_BROKER_URL": "redis://u:pla/planted@h/0"}, "'redis://...' has an @ behind its host (in a"),
        (
            {"GRADCAM_BROKER_URL": "redis://u:[planted]@h/0"},
            "'redis://h/0' has a user or a password that cannot be read as it is (in a user or a password",
        ),
        (
            {"GRADCAM_LEDGER_URL": "sentinels://:plan]ted@a:1,b:2/m/0"},
            "has a user or a password that cannot be read as it is (in a user or a password",
        ),
        ({"GRADCAM_BROKER_URL": "redis://h/0#planted"}, "'redis://h/0' has a part behind a #: it must"),
        (
            {"GRADCAM_BROKER_URL": "redis://h/nodb"},
            "has the path '/nodb': it must be the number of a database",
        ),
        (
            {"GRADCAM_LEDGER_URL": "redis://h/0?password=planted"},
            "GRADCAM_LEDGER_URL: 'redis://h/0' has options",
        ),
        (
            {"GRADCAM_BROKER_URL": "sentinel://:planted@a:1;sentinel://:planted@b:2"},
            "'sentinel://...' has a host, a port, or an @ behind its hosts, that cannot be read: it must",
        ),
        (
            {"GRADCAM_BROKER_URL": "redis+sentinel://a:26379/mymaster/0"},
            "'redis+sentinel://a:26379/mymaster/0' has another scheme than redis or rediss or sentinel",
        ),
        (
            {"GRADCAM_BROKER_URL": "sentinel://:planted@a:1,b:2"},
            "'sentinel://a:1,b:2' names no master behind the Sentinels: it must look like sentinel://host",
        ),
        ({"GRADCAM_LEDGER_URL": "sentinel://a/m/0?db=1"}, "'sentinel://a/m/0' has a part behind a ? or a #"),
        ({"GRADCAM_LEDGER_URL": "sentinel://a/m/x"}, "'sentinel://a/m/x' has the path '/m/x'"),
        ({"GRADCAM_BROKER_URL": "redis+cluster://a/0"}, "is that of a Redis Cluster, which is not supported"),
        (
            {"GRADCAM_LEDGER_URL": "rediss+cluster://:planted@a/0"},
            "GRADCAM_LEDGER_URL: 'rediss+cluster://a/0' is that",
        ),
        ({"GRADCAM_BROKER_URL": "redis-cluster://a:7000,b:7001"}, "is that of a Redis Cluster"),
        ({"GRADCAM_BROKER_URL": "redis://a:6379,b:6379/0"}, "names several servers: name one server, or one"),
        ({"GRADCAM_BROKER_URL": "redis://:planted@a/0;redis://:planted@b/0"}, "names several servers"),
        (
            {"GRADCAM_THREADS": "https://u:planted@h/"},
            "GRADCAM_THREADS: 'https://h/' was received: it should",
        ),
        (
            {"GRADCAM_STATUS_SQL_URL": "mysql://u:planted@h/d"},
            "GRADCAM_STATUS_SQL_URL: it has another scheme",
        ),
        ({"GRADCAM_STATUS_SQL_URL": "POSTGRESQL://h/d"}, "its scheme is not in lower case: it"),
        ({"GRADCAM_STATUS_SQL_URL": "postgresql://u:planted@h"}, "it names no database behind the host: it"),
        ({"GRADCAM_STATUS_SQL_URL": "sqlite:///:memory:"}, "it names no file of SQLite: it must look like"),
        (
            {"GRADCAM_S3_ENDPOINT_URL": "s3.example.com"},
            "GRADCAM_S3_ENDPOINT_URL: 's3.example.com' has no sch",
        ),
        ({"GRADCAM_VISIBILITY_TIMEOUT_S": "inf"}, "GRADCAM_VISIBILITY_TIMEOUT_S"),
        ({"GRADCAM_RETENTION_S": "nan"}, "GRADCAM_RETENTION_S"),
        ({"GRADCAM_METRICS_PORT": "70000"}, "GRADCAM_METRICS_PORT"),
        (
            {"GRADCAM_LOG_FORMAT": "xml"},
            "GRADCAM_LOG_FORMAT: 'xml' was received: it should be 'text' or 'json'",
        ),
        (
            {"GRADCAM_PRECISION": "float16"},
            "GRADCAM_PRECISION: 'float16' was received: it should be 'float32', 'tf32'",
        ),
    ],
)
def test_an_impossible_setting_is_named(variables: dict[str, str], expected: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment(variables)
    assert expected in str(caught.value)
    assert "planted" not in str(caught.value)
    assert str(caught.value).startswith("GRADCAM_")


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = {"GRADCAM_THREAD": "3", "GRADCAM_OUTPUT": "results", "GRADCAM_LEASE_S": "soon"}
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({**wrong, "GRADCAM_THREADS": "3"})
    number = "it should be a valid number, unable to parse string as a number."
    form = "must look like s3://bucket/prefix or file:///folder, without a user or a password."
    assert caught.value.problems == (
        "GRADCAM_THREAD: there is no such setting. Did you mean GRADCAM_THREADS?",
        f"GRADCAM_LEASE_S: 'soon' was received: {number}",
        f"GRADCAM_OUTPUT: 'results' {form}",
    )
    assert str(caught.value).splitlines() == [*caught.value.problems]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("localhost", "localhost"),
        ("localhost:6379/0", "localhost:6379/0"),
        ("redis:6379", "redis:6379"),
        ("cache.example.com:6380/1?x=planted", "cache.example.com:6380/1"),
        ("10.0.0.7", "10.0.0.7"),
        ("[fd00::1]:6379", "[fd00::1]:6379"),
        ("planted", "..."),
        ("planted.planted", "..."),
        ("user:planted@queue:6379", "..."),
        ("planted:123456", "..."),
    ],
)
@pytest.mark.parametrize("setting", ["BROKER_URL", "LEDGER_URL", "TRACES"])
def test_an_address_without_a_scheme_is_shown_and_what_may_be_a_password_is_not(
    setting: str, text: str, shown: str
) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({f"GRADCAM_{setting}": text})
    right = "http://collector:4318" if setting == "TRACES" else "redis://host:6379/0"
    assert f"GRADCAM_{setting}: {shown!r} has no scheme: it must look like {right}" in str(caught.value)
    assert "planted" not in str(caught.value)


FOLDERS_AND_FILES = [
    name
    for name, field in Settings.model_fields.items()
    if "Path" in str(field.annotation) or name == "image_roots"
]


@pytest.mark.parametrize("name", FOLDERS_AND_FILES)
def test_a_tilde_in_a_path_is_the_users_home(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").touch()
    read = Settings.from_environment({f"GRADCAM_{name.upper()}": "~/own"})
    assert getattr(read, name) in {tmp_path / "own", (str(tmp_path / "own"),)}
    with pytest.raises(InvalidSettings, match="'~nobody-here/own' names a user who has no home"):
        Settings.from_environment({f"GRADCAM_{name.upper()}": "~nobody-here/own"})


def test_the_paths_of_the_settings_are_known() -> None:
    assert FOLDERS_AND_FILES == [
        "redis_ca",
        "image_roots",
        "networks",
        "cache_dir",
        "weights_dir",
        "engine_socket",
        "metrics_socket",
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('["vgg16"]', ("vgg16",)),
        (' [ "vgg16", "a, b", " xception " ] ', ("vgg16", "a, b", "xception")),
        ("[]", ()),
        ('"[]"', ("[]",)),
        ("[fd00::1],[x]", ("[fd00::1]", "[x]")),
    ],
)
@pytest.mark.parametrize("name", ["preload", "image_roots"])
def test_a_list_may_be_json(name: str, text: str, values: tuple[str, ...]) -> None:
    read = Settings.from_environment({f"GRADCAM_{name.upper()}": text})
    assert getattr(read, name) == values
    assert Settings.from_environment(read.to_environment()) == read


def test_every_list_may_be_json() -> None:
    lists = [name for name, field in Settings.model_fields.items() if "tuple" in str(field.annotation)]
    assert len(lists) > 5
    for name in lists:
        assert getattr(Settings.from_environment({f"GRADCAM_{name.upper()}": "[]"}), name) == ()
        with pytest.raises(InvalidSettings, match="as a JSON list it must hold texts"):
            Settings.from_environment({f"GRADCAM_{name.upper()}": "[1]"})


def test_settings_by_keyword_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCAM_THREADS", "3")
    monkeypatch.setenv("GRADCAM_THREAD", "3")
    assert Settings().threads == 16
    assert Settings(threads=4).threads == 4
    monkeypatch.delenv("GRADCAM_THREAD")
    assert Settings.from_environment().threads == 3


def test_which_settings_were_given_is_known() -> None:
    assert Settings.from_environment({"GRADCAM_THREADS": "16"}).model_fields_set == {"threads"}


def injected(service: str, port: int, address: str = "10.96.0.7") -> dict[str, str]:
    """What Kubernetes sets in each pod of a namespace for a Service there."""
    name = service.upper().replace("-", "_")
    link = f"{name}_PORT_{port}_TCP"
    url = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_METRICS": str(port),
        f"{name}_PORT": url,
        link: url,
        f"{link}_PROTO": "tcp",
        f"{link}_PORT": str(port),
        f"{link}_ADDR": address,
    }


@pytest.mark.parametrize(
    "service", ["gradcam", "gradcam-deliver", "gradcam-prod-redis", "gradcam-metrics", "gradcam-broker-url"]
)
@pytest.mark.parametrize("address", ["10.96.0.7", "fd00::7"])
def test_what_kubernetes_says_of_services_that_begin_as_settings_do_is_passed_over(
    service: str, address: str
) -> None:
    read = Settings.from_environment({**injected(service, 9464, address), "GRADCAM_THREADS": "3"})
    assert read == Settings(threads=3)


def test_what_docker_says_of_linked_containers_is_passed_over() -> None:
    links = {
        "GRADCAM_REDIS_NAME": "/web/gradcam-redis",
        "GRADCAM_REDIS_PORT": "tcp://172.17.0.5:6379",
        "GRADCAM_REDIS_PORT_6379_TCP": "tcp://172.17.0.5:6379",
        "GRADCAM_REDIS_PORT_6379_TCP_ADDR": "172.17.0.5",
        "GRADCAM_REDIS_PORT_6379_TCP_PORT": "6379",
        "GRADCAM_REDIS_PORT_6379_TCP_PROTO": "tcp",
        "GRADCAM_REDIS_ENV_REDIS_VERSION": "7.2",
        "GRADCAM_REDIS_ENV_NOTES": "two\nlines",
    }
    assert Settings.from_environment(links) == Settings()


def test_a_setting_that_ends_as_a_service_does_is_read_and_one_that_is_misspelt_refused() -> None:
    assert Settings.from_environment({"GRADCAM_METRICS_PORT": "9464"}).metrics_port == 9464
    for name, value in {
        "GRADCAM_METRIC_PORT": "9464",
        "GRADCAM_PORT": "9464",
        "GRADCAM_METRICS_NAME": "here",
        "GRADCAM_SERVICE_HOSTS": "10.0.0.1",
        "GRADCAM_BROKER_SERVICE_PORTS": "1",
        "GRADCAM_METRICS_PORT_TCP": "tcp://10.0.0.1:9464",
    }.items():
        with pytest.raises(InvalidSettings, match=f"{name}: there is no such setting"):
            Settings.from_environment({name: value})


def test_settings_survive_the_way_to_a_child_process() -> None:
    settings = Settings(
        image_schemes=("s3", "file"),
        image_roots=("/data",),
        image_buckets=(),
        preload=("vgg16", "xception"),
        networks=Path("networks.toml"),
        cache_dir=Path("/cache"),
        weights_dir=Path("/weights"),
        precision="bfloat16",
        s3_access_key_id="key",
        s3_secret_access_key="planted",
    )
    assert Settings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/gradcam-worker"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/caches"}, "/caches/gradcam-worker"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, "/home/a/.cache/gradcam-worker"),
    ],
)
def test_model_files_are_kept_in_the_users_cache(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Settings().cache == Path(expected)
    assert Settings(cache_dir=Path("/own")).cache == Path("/own")


def test_who_has_no_home_must_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        message = "Could not determine home directory."
        raise RuntimeError(message)

    monkeypatch.setattr(Path, "home", homeless)
    assert Settings().networks is None, "a client needs no cache"
    with pytest.raises(InvalidSettings, match="GRADCAM_CACHE_DIR must name a folder"):
        _ = Settings().cache


def test_secrets_do_not_show() -> None:
    settings = Settings(s3_access_key_id="key", s3_secret_access_key="planted")
    assert "planted" not in repr(settings)
    assert without_secrets("redis://user:planted@queue:6379/0?password=planted") == "redis://queue:6379/0"
    assert "planted" not in without_secrets("http://[planted")
    assert "planted" not in without_secrets("http://user:pla/planted@host/x")
    assert "planted" not in without_secrets("user:planted@host/x")


def test_what_is_shown_of_settings_holds_no_password() -> None:
    url = "redis://user:planted@queue:6379/0"
    shown = repr(
        Settings(
            broker_url=url, ledger_url=url, s3_access_key_id="a", s3_secret_access_key=SecretStr("planted")
        )
    )
    assert "planted" not in shown


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("", "auto"), (" 0 ", 0), ("3", 3), ("256", 256)], ids=str
)
def test_job_processes_are_counted_or_chosen(text: str, value: int | str) -> None:
    read = Settings.from_environment({"GRADCAM_JOB_PROCESSES": text})
    assert read.job_processes == value
    assert Settings.from_environment(read.to_environment()).job_processes == value
    assert Settings().job_processes == "auto"


@pytest.mark.parametrize("text", ["many", "-1", "257", "2.5", "1e2", "000002"])
def test_any_other_number_of_job_processes_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        Settings.from_environment({"GRADCAM_JOB_PROCESSES": text})
    assert refused.value.problems == (
        f"GRADCAM_JOB_PROCESSES: {text!r} must be auto, or a number from 0 to 256.",
    )
