"""What stops a worker before it starts, and what it waits for."""

import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import BrokerUnavailable, InvalidSettings, LedgerUnavailable, StorageUnavailable
from gradcam_worker.operations import servers
from gradcam_worker.runtime import service_factory
from gradcam_worker.runtime.processes import preflight
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3_errors import IdentityFailed

PASSWORD = "planted-password"  # of a server that lives for a test
RIGHTS = "~gradcam:* +ping +select +hello +client|setinfo +llen"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Valkey that lets one user do everything, and one next to nothing."""
    folder = tmp_path_factory.mktemp("guarded")
    users = [f"user all on >{PASSWORD} ~* &* +@all", f"user few on >{PASSWORD} {RIGHTS}", "user default off"]
    (folder / "users.acl").write_text("\n".join(users))
    with servers.valkey(folder, "--aclfile", str(folder / "users.acl")) as server:
        yield server.port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a cluster of one node, which answers as a single server does."""
    folder = tmp_path_factory.mktemp("cluster")
    with servers.valkey(
        folder, "--cluster-enabled", "yes", "--cluster-port", str(servers.free_port())
    ) as server:
        with redis.Redis(port=server.port) as connection:
            node: Any = connection
            node.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            end = time.monotonic() + 20
            while node.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                assert time.monotonic() < end
                time.sleep(0.02)
        yield server.port


@pytest.mark.parametrize("name", ["GRADCAM_BROKER_URL", "GRADCAM_LEDGER_URL"])
def test_a_redis_cluster_is_refused_by_name(name: str, cluster: int, settings: Settings) -> None:
    url = f"redis://127.0.0.1:{cluster}/0"
    changed = settings.changed(**{name.removeprefix("GRADCAM_").lower(): url})
    with pytest.raises(
        InvalidSettings, match=rf"^{name}: the server is a Redis Cluster, which is not supported: name one"
    ):
        preflight.check(changed, stores=False)


def test_a_client_of_a_node_that_has_other_keys_is_told_at_once_that_it_is_a_cluster(tmp_path: Path) -> None:
    with (
        servers.valkey(
            tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(servers.free_port())
        ) as node,
        GradcamClient(f"redis://127.0.0.1:{node.port}/0") as client,
        pytest.raises(
            LedgerUnavailable, match=r"is part of a Redis Cluster, which is not supported"
        ) as caught,
    ):
        client.submit(image="s3://in/a.jpg", network="vgg16", target={"top_n": 1}, idempotency_key="k")
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("url", "name", "why"),
    [
        ("redis://127.0.0.1:{port}/0", "GRADCAM_BROKER_URL", "Authentication required"),
        (f"redis://all:{PASSWORD}X@127.0.0.1:{{port}}/0", "GRADCAM_BROKER_URL", "invalid username-password"),
        (f"redis://all:{PASSWORD}@127.0.0.1:{{port}}/77", "GRADCAM_BROKER_URL", "out of range"),
        (f"redis://few:{PASSWORD}@127.0.0.1:{{port}}/0", "GRADCAM_BROKER_URL", "no permissions"),
        ("redis://127.0.0.1:{s3}/0", "GRADCAM_BROKER_URL", "Protocol [Ee]rror"),
        ("rediss://localhost:{tls}/0", "GRADCAM_BROKER_URL or GRADCAM_REDIS_CA", "self-signed|issuer"),
    ],
    ids=[
        "no password",
        "wrong password",
        "no such database",
        "too few rights",
        "no Redis",
        "unknown authority",
    ],
)
def test_a_broker_that_will_never_let_us_in_stops_a_worker(
    url: str, name: str, why: str, guarded: int, s3_server: servers.S3Server, encrypted: Callable[[int], Any]
) -> None:
    tls = encrypted(guarded).port if "{tls}" in url else 0
    settings = Settings(broker_url=url.format(port=guarded, s3=s3_server.port, tls=tls))
    with pytest.raises(InvalidSettings, match=rf"^{name}: .*({why})") as caught:
        preflight.check(settings, stores=False)
    assert PASSWORD not in str(caught.value)


def test_a_ledger_of_its_own_is_called_by_its_own_name_and_a_false_authority_too(
    valkey: str, guarded: int, tmp_path: Path
) -> None:
    apart = Settings(broker_url=valkey, ledger_url=f"redis://127.0.0.1:{guarded}/0")
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_LEDGER_URL: The ledger"):
        preflight.check(apart, stores=False)
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_BROKER_URL or GRADCAM_REDIS_CA: .*NO_CERTIFICATE"):
        preflight.check(
            Settings(broker_url=f"rediss://localhost:{guarded}/0", redis_ca=tmp_path / "ca.pem"), stores=False
        )


def test_the_hint_about_an_identity_is_one_sentence_without_gaps() -> None:
    error = StorageUnavailable("No credentials")
    error.__cause__ = IdentityFailed("No")
    assert "  " not in preflight.storage_hint(error).fix


def test_a_server_that_does_not_answer_is_not_taken_for_a_folder() -> None:
    error = StorageUnavailable("no answer within 5.0 s")
    error.__cause__ = TimeoutError("no answer within 5.0 s")
    hint = preflight.storage_hint(error)
    assert (hint.fix.partition(" ")[0], hint.permanent) == ("Start", False)
    error.__cause__ = PermissionError(13, "Permission denied")
    assert preflight.storage_hint(error).fix == "Name a folder that the worker may write to."


def test_an_output_that_is_not_set_is_named_rather_than_its_default_refused(
    s3_settings: dict[str, Any],
) -> None:
    with pytest.raises(
        InvalidSettings,
        match=r"^GRADCAM_OUTPUT is not set, and its default, .*Set GRADCAM_OUTPUT",
    ):
        preflight.check_storage(Settings(**s3_settings))


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"output": "s3://nowhere/cams"}, "GRADCAM_OUTPUT", "NoSuchBucket"),
        ({"s3_access_key_id": "nobody"}, "GRADCAM_S3_ACCESS_KEY_ID", "InvalidAccessKeyId"),
        (
            {"s3_secret_access_key": SecretStr(PASSWORD)},
            "GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY",
            "SignatureDoesNotMatch",
        ),
        ({"s3_endpoint_url": "127.0.0.1:9000"}, "GRADCAM_S3_ENDPOINT_URL", "Invalid endpoint"),
        ({"output": Path(__file__).as_uri()}, "GRADCAM_OUTPUT", "File exists"),
    ],
)
def test_storage_that_will_never_take_anything_stops_a_worker(
    changes: dict[str, Any], name: str, why: str, settings: Settings, s3_settings: dict[str, Any]
) -> None:
    right = {**s3_settings, "output": "s3://results/cams"}
    preflight.check(settings.model_copy(update=right))
    with pytest.raises(InvalidSettings, match=rf"^{name}.*{why}") as caught:
        preflight.check(settings.model_copy(update={**right, **changes}))
    assert PASSWORD not in str(caught.value)


def test_a_bucket_that_may_not_be_written_stops_a_worker(
    settings: Settings, public_server: Any, answer: Any, s3_settings: dict[str, Any]
) -> None:
    denied = b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"
    public_server.url("/results/cams/health/probe.txt", answer(403, denied))
    changes = {
        **s3_settings,
        "s3_endpoint_url": f"http://{public_server.host}",
        "output": "s3://results/cams",
    }
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_OUTPUT: .*AccessDenied.*deploy/s3/policy.json"):
        preflight.check_storage(settings.model_copy(update=changes))


def test_each_refusal_of_storage_has_a_hint_that_fits_it(
    settings: Settings, public_server: Any, answer: Any, s3_settings: dict[str, Any]
) -> None:
    here = {**s3_settings, "s3_endpoint_url": f"http://{public_server.host}", "output": "s3://results/hints"}
    for status, code, setting, fix in (
        (404, "NoSuchBucket", "GRADCAM_OUTPUT", "Create the bucket"),
        (403, "AccessDenied", "GRADCAM_OUTPUT", "Grant what deploy/s3/policy.json names"),
        (400, "InvalidRequest", "GRADCAM_OUTPUT", "Put right what the server names"),
        (400, "KMS.DisabledException", "GRADCAM_OUTPUT", "Put right the key that encrypts the bucket"),
        (403, "RequestTimeTooSkewed", "GRADCAM_S3_ACCESS_KEY_ID and", "this machine's clock"),
        (403, None, "GRADCAM_S3_ENDPOINT_URL", "HTTPS_PROXY"),
    ):
        body = f"<Error><Code>{code}</Code><Message>As I say</Message></Error>" if code else "<html></html>"
        public_server.url("/results/hints/health/probe.txt", answer(status, body.encode()))
        with pytest.raises(StorageUnavailable, match="As I say" if code else "HTTP 403") as caught:
            preflight.probe_storage(settings.model_copy(update=here))
        hint = preflight.storage_hint(caught.value)
        assert hint.setting.startswith(setting)
        assert fix in hint.fix
        assert hint.permanent is (code is not None)


def test_what_is_only_away_is_waited_for(
    settings: Settings, free_port: int, s3_settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = {
        "broker_url": f"redis://127.0.0.1:{free_port}/0",
        "s3_endpoint_url": f"http://127.0.0.1:{free_port}",
    }
    away = settings.model_copy(update={**s3_settings, **nowhere, "output": "s3://results/cams"})
    preflight.check(away)
    assert [line.partition(" ")[0] for line in caplog.messages if "awaited" in line] == ["server_awaited"] * 3
    with pytest.raises(BrokerUnavailable):
        preflight.check_broker(away)
    with pytest.raises(LedgerUnavailable):
        preflight.check_ledger(away)
    with pytest.raises(StorageUnavailable):
        preflight.check_storage(away)


def test_networks_that_there_are_not_stop_a_worker_before_anything_is_asked(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_PRELOAD: There is no network 'vgg61'.*'vgg16'"):
        preflight.check(settings.model_copy(update={"preload": ("vgg61",)}))
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_NETWORKS: .*none.toml"):
        preflight.check(settings.model_copy(update={"networks": tmp_path / "none.toml"}))


def test_a_cache_that_cannot_be_written_stops_a_worker_unless_everything_is_in_it(
    settings: Settings, tmp_path: Path
) -> None:
    sha256 = "ab" * 32
    table = f'[networks.own]\nmodel = "own.keras"\nsha256 = "{sha256}"\npreprocessing = "unit"\n'
    (tmp_path / "networks.toml").write_text(table + "input_size = [32, 32]\n")
    (tmp_path / "file").touch()
    own = settings.model_copy(
        update={"networks": tmp_path / "networks.toml", "cache_dir": tmp_path / "file" / "c"}
    )
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_CACHE_DIR: .*own is not in it"):
        preflight.check_cache(own, preflight.load_registry(own))
    preflight.check_cache(
        settings.model_copy(update={"cache_dir": tmp_path / "file"}), preflight.load_registry(settings)
    )
    full = own.model_copy(update={"cache_dir": tmp_path})
    (tmp_path / f"{sha256}.keras").touch()
    preflight.check_cache(full, preflight.load_registry(full))


@pytest.mark.parametrize(
    ("devices", "extra", "found", "stopped"),
    [
        ("auto", False, "cpu", False),
        ("auto", True, "cpu", True),
        ("auto", True, "NVIDIA H100", False),
        ("cpu", True, "cpu", False),
        ("0", False, "cpu", True),
    ],
)
def test_a_gpu_that_was_asked_for_and_is_not_seen_stops_a_worker(
    devices: str, extra: bool, found: str, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_has_gpu_extra", lambda: extra)
    monkeypatch.setattr(service_factory, "device_name", lambda: found)
    if not stopped:
        assert preflight.check_device(Settings(devices=devices)) == found
        return
    with pytest.raises(InvalidSettings, match=rf"^GRADCAM_DEVICES is '{devices}'.*no GPU can be computed on"):
        preflight.check_device(Settings(devices=devices))


def test_the_gpu_extra_is_known_by_the_library_that_only_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not preflight._has_gpu_extra()
    module = ModuleType("pynvml")
    module.__spec__ = spec_from_loader("pynvml", None)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert preflight._has_gpu_extra()
