"""Every setting, `GRADCAM_*`, read from the environment by pydantic-settings.

A list is written with commas: `GRADCAM_IMAGE_SCHEMES=s3,https`; what holds a comma stands in double quotes.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.net import allowlist, ip_policy
from gradcam_worker.net.webhook_signing import secrets_of
from gradcam_worker.schemas import bucket_names
from gradcam_worker.text import comma_lists, urls
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import visible

PREFIX = "GRADCAM_"
PLACE_LOOKS = "must look like s3://bucket/prefix or file:///folder, without a user or a password"
ONE_SERVER = "name one server, or one address that leads to the master, as redis://host:6379/0"
SCHEMES = ("s3", "https", "http", "file", "data")
REDIS_LOOKS = "must look like redis://host:6379/0, or rediss:// for TLS"
DATABASE_LOOKS = "must look like sqlite:////folder/status.db or postgresql://user:password@host/database"
COLLECTOR_FORM = "must look like http://collector:4318"
S3_SERVER_LOOKS = "must look like https://s3.example.com:9000"
BAD_PORT = f"a port that is no number from 1 to {urls.LARGEST_PORT}"
MAX_RECEIVED = 100  # characters of a value, in an error
# What Kubernetes sets in each pod for each Service of its namespace (enableServiceLinks), and Docker for each
# linked container: for one called gradcam-x, names that begin as ours do. None of ours has such a value.
SERVICE_LINKS = (
    (r"_SERVICE_HOST", r"[0-9a-fA-F.:]+"),
    (r"_SERVICE_PORT(_[A-Z0-9_]+)?", r"[0-9]+"),
    (r"_PORT(_[0-9]+_(TCP|UDP|SCTP))?", r"(tcp|udp|sctp)://\S+:[0-9]+"),
    (r"_PORT_[0-9]+_(TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
    (r"_PORT_[0-9]+_(TCP|UDP|SCTP)_PORT", r"[0-9]+"),
    (r"_PORT_[0-9]+_(TCP|UDP|SCTP)_ADDR", r"[0-9a-fA-F.:]+"),
    (r"_NAME", r"/[^/]+/[^/]+"),
    (r"_ENV_\w+", r".*"),
)


def _unless_empty(check: Callable[[str], str]) -> AfterValidator:
    return AfterValidator(lambda text: text and check(text))


def _split(value: Any) -> Any:
    return comma_lists.parse(value) if isinstance(value, str) else value


def _devices(value: Any) -> Any:
    """Without spaces; auto where it is empty."""
    devices = str(value).replace(" ", "") or "auto"
    if not re.fullmatch(r"auto|cpu|[0-9]{1,3}(,[0-9]{1,3})*", devices):
        message = f"{value!r} must be auto, cpu, or the numbers of GPUs, as in 0,1"
        raise ValueError(message)
    return devices


def _webhook_secrets(value: SecretStr) -> SecretStr:
    secrets_of(value.get_secret_value())
    return value


def _database_url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text and (problem := _database_problem(text)):
        raise ValueError(problem)
    return value


def _redis_url(text: str) -> str:
    if problem := _redis_problem(text):
        raise ValueError(problem)
    return text


def _s3_server(text: str) -> str:
    if problem := _s3_server_problem(text):
        raise ValueError(problem)
    return text


def _traces_url(text: str) -> str:
    shown = repr(without_secrets(text) if "://" in text else "...")
    if problem := _url_problem(text, shown, ("http", "https")):
        message = f"{problem}: it {COLLECTOR_FORM}"
        raise ValueError(message)
    return text


def _storage_uri(text: str) -> str:
    if not is_place(text):
        message = f"{without_secrets(text)!r} {PLACE_LOOKS}"
        raise ValueError(message)
    return text


def _storage_uris(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_storage_uri, texts))


def _bucket_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if {"/", "@"} & set(name):
            message = f"{without_secrets(name)!r} must be the name of a bucket, as photos, or *"
            raise ValueError(message)
    return names


def _schemes(names: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := sorted(set(names) - set(SCHEMES)):
        message = f"{unknown[0]!r} is no scheme of an image: it must be one of {', '.join(SCHEMES)}"
        raise ValueError(message)
    return names


def _file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        message = f"{str(path)!r} is not a file: name one with certificates in PEM"
        raise ValueError(message)
    return path


def _redis_problem(text: str) -> str | None:
    """Why this is no URL of one Redis server, without what may be secret in it; None where it is one."""
    scheme, slashes, rest = text.partition("://")
    shown = repr(without_secrets(text) if slashes or not text else "...")  # no URL: it may be a password
    place = re.split("[/?#]", rest)[0].rpartition("@")[2]
    for word in ("cluster", "sentinel"):
        if word in scheme.lower():
            return f"{shown} is that of a Redis {word.title()}, which is not supported: {ONE_SERVER}"
    if re.search("[,;]", place) or re.search(r"[,;]\s*\w+://", text):
        return f"{shown} names several servers: {ONE_SERVER}"
    problem = _url_problem(text, shown, ("redis", "rediss"))
    found = urls.parse(text)
    if problem or not found:
        return f"{problem}: it {REDIS_LOOKS}"
    database = found.path.strip("/")
    if found.query:
        return f"{shown} has options behind a ?, which are not supported: it {REDIS_LOOKS}{_encode(text)}"
    if database and not database.isdecimal():
        return f"{shown} has the path {found.path!r}: it must be the number of a database, as /0"
    return None


def _database_problem(text: str) -> str | None:
    """Why this is no URL of a database for statuses, without what may be secret in it."""
    scheme, _, rest = text.partition("://")
    if scheme == "sqlite":  # in a file: what is in memory no other process can read
        fits = rest.startswith("/") and rest not in {"/", "//", "/:memory:"} and "?" not in rest
        return None if fits else f"it names no file of SQLite: it {DATABASE_LOOKS}"
    problem = _url_problem(text, "it", ("postgresql", "postgresql+psycopg"), host_needed=False)
    found = urls.parse(text)
    if not problem and found and not found.path.strip("/"):
        problem = "it names no database behind the host"
    return problem and f"{problem}: it {DATABASE_LOOKS}; {urls.ENCODE}"


def _s3_server_problem(text: str) -> str | None:
    """Why this is no address of an S3 server: S3 takes no user in it, and presigned URLs would show it."""
    found = urls.parse(text)
    in_path = bool(found and "@" in found.path)  # what stands before it may be a user and half a password
    shown = repr(f"{text.partition('://')[0]}://..." if in_path else without_secrets(text))
    if found and (found.has_user or in_path or found.query):
        keys = "GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY"
        return f"{shown} must be scheme, host and port alone: user and password are {keys}"
    problem = _url_problem(text, shown, ("http", "https"))
    return problem and f"{problem}: it {S3_SERVER_LOOKS}"


def _url_problem(text: str, shown: str, schemes: tuple[str, ...], *, host_needed: bool = True) -> str | None:
    """Which part of a URL is wrong: its scheme, host, port, or a fragment."""
    scheme, slashes, _ = text.partition("://")
    if not slashes:
        return f"{shown} has no scheme"
    if scheme.lower() not in schemes:
        return f"{shown} has another scheme than {' or '.join(schemes)}"
    found = urls.parse(text)
    if not found:
        return f"{shown} has {_unreadable_part(text)}"
    if host_needed and not found.host:
        return f"{shown} names no host"
    if found.port == 0:
        return f"{shown} has {BAD_PORT}"
    return None if found.fragment is None else f"{shown} has a part behind a #{_encode(text)}"


def _unreadable_part(text: str) -> str:
    """Which part of a URL that `urls.parse` refuses is wrong; it is not shown: it may be a password."""
    rest = text.partition("://")[2]
    authority = re.split("[/?#]", rest)[0]
    if "@" in rest[len(authority) :]:
        return f"an @ behind its host{_encode(text)}"
    port = re.search(r":([^:\]]*)\Z", authority.rpartition("@")[2])
    if port and not (port[1].isdecimal() and int(port[1]) <= urls.LARGEST_PORT):
        return BAD_PORT
    return f"a host that cannot be read{_encode(text)}"


def _encode(text: str) -> str:
    """How to write a password, where one may be the reason."""
    return f" ({urls.ENCODE})" if "@" in text else ""


RedisUrl = Annotated[str, AfterValidator(_redis_url), Field(repr=False)]  # it may hold a password
OptionalRedisUrl = Annotated[str, _unless_empty(_redis_url), Field(repr=False)]
WebhookSecrets = Annotated[SecretStr, AfterValidator(_webhook_secrets)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
StringList = Annotated[tuple[str, ...], BeforeValidator(_split)]
SchemeList = Annotated[StringList, AfterValidator(_schemes)]
HostList = Annotated[StringList, AfterValidator(allowlist.listed)]
NetworkList = Annotated[StringList, AfterValidator(ip_policy.listed)]
BucketList = Annotated[StringList, AfterValidator(_bucket_names)]
StorageUri = Annotated[str, AfterValidator(_storage_uri)]
OptionalStorageUri = Annotated[str, _unless_empty(_storage_uri)]
StorageUriList = Annotated[StringList, AfterValidator(_storage_uris)]
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
PemFile = Annotated[OptionalPath, AfterValidator(_file)]
TracesUrl = Annotated[str, _unless_empty(_traces_url), Field(repr=False)]  # it may hold a password
S3ServerUrl = Annotated[str, _unless_empty(_s3_server)]
Devices = Annotated[str, BeforeValidator(_devices)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]
Retention = Annotated[float, Field(ge=60, le=3650 * 86_400)]  # seconds
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
CountOrAuto = Annotated[int, Field(ge=0, le=4096)]  # 0: found out


class EnvironmentSource(EnvSettingsSource):
    """The settings in an environment, without what Kubernetes and Docker set there."""

    def __init__(self, settings_cls: type[BaseSettings], environment: Mapping[str, str]) -> None:
        """Read `GRADCAM_*` of an environment."""
        super().__init__(settings_cls)
        self.env_vars = {
            name.lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX) and not _is_service_link(name, value)
        }

    def unknown(self) -> Iterable[str]:
        """A sentence for each variable that is no setting."""
        fields = self.settings_cls.model_fields
        for variable in self.env_vars:
            name = variable.removeprefix(PREFIX.lower())
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f" Did you mean {_variable(near[0])}?" if near else ""
                yield f"{_variable(name)}: there is no such setting.{hint}"


class Settings(BaseSettings):
    """What an operator decides: frozen, checked as a whole, the same for client and worker.

    `Settings(...)` takes values by keyword and has defaults for the others; `from_environment` reads
    `GRADCAM_*`.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        enable_decoding=False,  # a list is written with commas, not as JSON
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # it may be a secret, or stand beside one
    )

    # Queue and ledger
    broker_url: RedisUrl = "redis://127.0.0.1:6379/0"
    ledger_url: OptionalRedisUrl = ""  # empty: where the broker is
    redis_ca: PemFile = None  # certificate authority of a rediss:// server; none: those of the system
    key_prefix: str = "gradcam:"  # of every key in Redis, the broker's and the ledger's
    visibility_timeout_s: Annotated[float, Field(ge=2, le=86_400)] = (
        900  # after which an unacknowledged message returns
    )
    retention_s: Retention = 7 * 86_400  # how long a final job stays readable
    idempotency_retention_s: Retention = 7 * 86_400  # ... and one with an idempotency key, at least
    lease_s: Annotated[float, Field(ge=1, le=300)] = (
        15  # that a running job stays its worker's unless renewed, every second or oftener
    )
    lost_after_s: Annotated[float, Field(ge=1, le=3600)] = (
        20  # before a queued job whose message is not to be found is published again
    )
    max_message_bytes: Count = 1024 * 1024

    # Images
    image_schemes: SchemeList = ("s3",)
    image_buckets: BucketList = ("*",)  # "*": whatever the worker's credentials can read
    image_hosts: HostList = ()  # host, host:port or *.example.com, for http and https
    image_roots: StringList = ()  # folders, for file
    max_image_bytes: Count = 32 * 1024 * 1024
    max_image_pixels: Annotated[int, Field(ge=1, le=2**28)] = 64_000_000  # no decoder here takes more
    max_image_side: Count = 32_767  # pixels
    max_image_damage: Share = 0.05  # of an image may be missing: with more it is refused
    max_data_uri_bytes: Count = 256 * 1024
    fetch_timeout_s: Seconds = 20  # for the whole of one image
    max_classes: Count = 50  # explained in one job
    private_networks: NetworkList = ()  # as 10.0.0.0/8: where these hosts may lead, too
    max_bytes_in_flight: Count = 512 * 1024 * 1024  # of images read and not yet decoded, in one process
    max_pixels_in_flight: Count = 256_000_000  # of decoded images, in one process

    # Storage
    output: StorageUri = "s3://gradcam/results"  # where artifacts go unless the job says otherwise
    output_prefixes: StorageUriList = ()  # where else a job may send them
    uploads: OptionalStorageUri = (
        ""  # where `GradcamClient.upload_and_submit` puts images; empty: it has to be told
    )
    s3_endpoint_url: S3ServerUrl = ""  # empty: Amazon
    s3_public_url: S3ServerUrl = (
        ""  # the same server as browsers reach it, for presigned URLs; empty: the endpoint
    )
    s3_region: str = ""  # empty: AWS_REGION, AWS_DEFAULT_REGION, us-east-1
    s3_access_key_id: str = ""  # empty: the usual AWS places
    s3_secret_access_key: SecretStr = SecretStr("")

    # Status
    webhook_hosts: HostList = ()  # host, host:port or *.example.com
    webhook_timeout_s: Seconds = 10
    webhook_give_up_s: Seconds = 3 * 86_400  # of trying, then the event is parked
    webhook_secrets: WebhookSecrets = SecretStr("")  # app1=whsec_new whsec_old,app2=whsec_...
    couriers: Count = 4  # events on their way at once, from one process
    status_sql_url: DatabaseUrl = SecretStr("")  # of a database that is told, too: see `_database`
    status_sql_retention_s: Retention = 90 * 86_400

    # Networks
    networks: OptionalPath = (
        None  # a TOML file that describes the operator's own: see `gradcam_worker.gradcam.models.registry`
    )
    cache_bytes: Count = 32 * 1024**3  # of their files: the least recently used makes room
    cache_dir: OptionalPath = None  # for their files, by checksum; none: the user's own cache
    weights_dir: OptionalPath = None  # a folder of weights for the catalog's networks
    precision: Literal["float32", "tf32", "bfloat16", "mixed_bfloat16"] = "float32"
    exact_backward: bool = False  # the whole way back, where a shorter one gives the same
    resident_bytes: Count = 8 * 1024**3  # of all networks in memory: the least recently used makes room

    # The device
    devices: Devices = "auto"  # every GPU there is, a process for each; or their numbers, 0,1; or cpu
    max_batch: Annotated[int, Field(ge=0, le=256)] = (
        0  # images in one pass; 0: as many as prove worth it when a network is warmed
    )
    batch_wait_s: Annotated[float, Field(ge=0, le=1)] = (
        0.01  # that a batch waits for jobs on their way, at most
    )
    intra_op_threads: CountOrAuto = 0  # of one operation on the CPU; 0: one for each core

    # Worker
    preload: StringList = ()  # networks to load before the first job
    threads: Count = 16  # jobs in hand at once, twice a CPU's batch; where it is not set, a GPU gets 64
    shards: Count = (
        2  # of backfills, in hand at once beside those jobs: one is read while another is computed
    )
    retry_backoff_s: Seconds = 1  # before the second attempt; doubles, with jitter
    retry_backoff_max_s: Seconds = 60
    shutdown_timeout_s: Seconds = 90  # after which a worker that was asked to stop hands back what it has
    stalled_after_s: Annotated[float, Field(ge=5, le=3600)] = (
        60  # without a sign of life a worker is started again
    )
    hung_after_s: Annotated[float, Field(ge=60, le=7 * 86_400)] = (
        3600  # that no job in hand gets on, while others wait, before the worker is started again
    )
    memory_bytes: Annotated[int, Field(ge=0)] = 0  # that a process may use; 0: no limit of its own
    starts: Count = 1  # of the worker on this device, this one too: its supervisor counts them

    # What an operator sees
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = (
        0  # of /metrics, /live, /ready and /startup; worker process N of a machine has port + N; 0: none
    )
    metrics_host: str = "127.0.0.1"  # the address they are served at; 0.0.0.0: every one
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    traces: TracesUrl = ""  # where spans go, by OTLP/HTTP, as http://collector:4318; empty: nowhere

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`Settings(...)` reads no environment: see `from_environment`."""
        del cls, settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @field_validator("image_hosts")
    @classmethod
    def _hosts_for_web_images(cls, hosts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not hosts and {"http", "https"} & set(info.data.get("image_schemes", ())):
            message = "it names no host, but GRADCAM_IMAGE_SCHEMES allows http or https: write host:port"
            raise ValueError(message)
        return hosts

    @field_validator("image_roots")
    @classmethod
    def _roots_for_files(cls, roots: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not roots and "file" in info.data.get("image_schemes", ()):
            message = "it names no folder, but GRADCAM_IMAGE_SCHEMES allows file: name the folders of images"
            raise ValueError(message)
        return roots

    @field_validator("s3_secret_access_key")
    @classmethod
    def _key_and_secret(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr:
        if bool(secret.get_secret_value()) != bool(info.data.get("s3_access_key_id")):
            message = "it and GRADCAM_S3_ACCESS_KEY_ID must be given together"
            raise ValueError(message)
        return secret

    @property
    def ledger(self) -> str:
        """The ledger's URL."""
        return self.ledger_url or self.broker_url

    def redis_tls(self, text: str) -> dict[str, Any]:
        """What redis-py is told beside a rediss:// URL: to verify the server, and who vouches for it."""
        if not text.casefold().startswith("rediss:"):
            return {}
        trust = {"ssl_ca_certs": str(self.redis_ca)} if self.redis_ca else {}
        return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **trust}

    @property
    def region(self) -> str:
        """Of S3, and of the STS that gives its keys."""
        found = (self.s3_region, *map(os.environ.get, ("AWS_REGION", "AWS_DEFAULT_REGION")))
        return next(filter(None, found), "us-east-1")

    @property
    def cache(self) -> Path:
        """The folder for operators' model files. Raises InvalidSettings where there is none to be found."""
        if self.cache_dir:
            return self.cache_dir
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # which counts only where it is absolute
            return (base if base.is_absolute() else Path.home() / ".cache") / "gradcam-worker"
        except RuntimeError as error:
            message = "GRADCAM_CACHE_DIR must name a folder: this user has no home."
            raise InvalidSettings(message) from error

    @property
    def keras_home(self) -> Path:
        """Where Keras keeps what it downloads, in `models`. Raises InvalidSettings where that is nowhere."""
        try:
            return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
        except RuntimeError as error:
            message = "KERAS_HOME must name a folder: this user has no home."
            raise InvalidSettings(message) from error

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **options: str | None) -> Self:
        """Read `GRADCAM_*`.

        Args:
            environment: Where to read; None: the process's own.
            options: What a command line says, by the setting's name; it comes first, unless it is None.

        Raises:
            InvalidSettings: It names each variable that is wrong, and what would be right.
        """
        source = EnvironmentSource(cls, os.environ if environment is None else environment)
        return cls._of({**source(), **_given(options)}, source.unknown())

    def changed(self, **options: str | None) -> Self:
        """These settings, and what `options` say, unless it is None. Raises InvalidSettings."""
        return self._of({**dict(self), **_given(options)})

    @classmethod
    def _of(cls, values: Mapping[str, Any], problems: Iterable[str] = ()) -> Self:
        """Settings of these values. Raises InvalidSettings with these problems and its own."""
        found = [*problems]
        try:
            settings = cls(**values)
        except ValidationError as error:
            found += [cls._problem(one) for one in error.errors(include_url=False)]
            raise InvalidSettings(" ".join(found)) from error
        if found:
            raise InvalidSettings(" ".join(found))
        return settings

    @classmethod
    def _problem(cls, error: ErrorDetails) -> str:
        """A sentence: which variable is wrong, what was received, what would be right."""
        name = str(error["loc"][0])
        message = error["msg"].removeprefix("Value error, ")
        field = cls.model_fields.get(name)
        if error["type"] != "value_error":  # pydantic's own: ours say themselves what was received
            may_be_shown = isinstance(error["input"], str) and field and field.repr
            received = visible(without_secrets(error["input"])[:MAX_RECEIVED]) if may_be_shown else "..."
            message = f"{received!r} was received: {message.replace('Input should', 'it should')}"
        stop = "" if message.endswith((".", "?")) else "."
        return f"{_variable(name)}: {message}{stop}"

    def to_environment(self) -> dict[str, str]:
        """The same settings as `GRADCAM_*` variables, for a child process."""
        plain: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            text = (
                comma_lists.join(value) if isinstance(value, tuple) else "" if value is None else str(value)
            )
            plain[_variable(name)] = text
        return plain

    def environment_for_child(self) -> dict[str, str]:
        """This process's environment with these settings in it, whole."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return others | self.to_environment()


def _variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def _given(options: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker has set a variable, for a Service or a container called `gradcam...`."""
    return any(
        re.fullmatch(rf"GRADCAM(_\w+?)?{ends}", name) and re.fullmatch(said, value, re.DOTALL)
        for ends, said in SERVICE_LINKS
    )


def is_place(uri: str) -> bool:
    """Whether objects can be put below this URI."""
    scheme, _, rest = uri.partition("://")
    fits = scheme == "file" or (scheme == "s3" and bucket_names.objection(rest.partition("/")[0]) is None)
    whole = bool(rest.strip("/")) and not {"?", "#"} & set(rest)
    return fits and whole and not urls.has_credentials(uri)
