"""Every knob, `GRADCAM_*`: the only reader of the environment.

A list is written with commas: `GRADCAM_IMAGE_SCHEMES=s3,https`; what holds a comma stands in double quotes.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.net import allowlist, ip_policy
from gradcam_worker.net.webhook_signing import secrets_of
from gradcam_worker.observability.tracing import checked
from gradcam_worker.schemas import bucket_names
from gradcam_worker.text import comma_lists, urls
from gradcam_worker.text.urls import without_secrets

PREFIX = "GRADCAM_"
PLACE_LOOKS = "must look like s3://bucket/prefix or file:///folder, without a user or a password"
ONE_SERVER = "name one server, or one address that leads to the master, as redis://host:6379/0"
SCHEMES = ("s3", "https", "http", "file", "data")
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


def _split(value: Any) -> Any:
    return comma_lists.parse(value) if isinstance(value, str) else value


def _devices(value: Any) -> Any:
    """Spaces left out; auto where nothing is said."""
    said = str(value).replace(" ", "") or "auto"
    if not re.fullmatch(r"auto|cpu|[0-9]{1,3}(,[0-9]{1,3})*", said):
        message = f"devices {value!r} must be auto, cpu, or the numbers of GPUs, as in 0,1"
        raise ValueError(message)
    return said


def _signing(value: SecretStr) -> SecretStr:
    secrets_of(value.get_secret_value())
    return value


def _database(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text and not _is_database(text):
        looks = "it must look like sqlite:////folder/status.db or postgresql://user:password@host/database"
        message = f"{looks}: {urls.ENCODE}"
        raise ValueError(message)
    return value


def _s3_server(text: str) -> str:
    """The address of an S3 server, or empty: S3 takes no user in it, and presigned URLs would show it."""
    found = urls.parse(text) if text else None
    in_path = bool(found and "@" in found.path)  # what stands before it may be a user and half a password
    shown = f"{text.partition('://')[0]}://..." if in_path else without_secrets(text)
    if text and (not found or found.scheme not in {"http", "https"} or not found.host):
        message = f"{shown!r} must look like https://s3.example.com:9000"
        raise ValueError(message)
    if found and (found.has_user or in_path or found.query or found.fragment):
        message = (
            f"{shown!r} must be scheme, host and port alone: user and password are "
            "s3_access_key_id and s3_secret_access_key"
        )
        raise ValueError(message)
    return text


def _bucket_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if {"/", "@"} & set(name):
            message = f"{without_secrets(name)!r} must be the name of a bucket, as photos, or *"
            raise ValueError(message)
    return names


SigningSecrets = Annotated[SecretStr, AfterValidator(_signing)]
Database = Annotated[SecretStr, AfterValidator(_database)]
Listed = Annotated[tuple[str, ...], BeforeValidator(_split)]
HostList = Annotated[Listed, AfterValidator(allowlist.listed)]
NetworkList = Annotated[Listed, AfterValidator(ip_policy.listed)]
Place = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
Endpoint = Annotated[str, AfterValidator(checked), Field(repr=False)]  # it may hold a password
S3Server = Annotated[str, AfterValidator(_s3_server)]
BucketList = Annotated[Listed, AfterValidator(_bucket_names)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]
Retention = Annotated[float, Field(ge=60, le=3650 * 86_400)]  # seconds
Count = Annotated[int, Field(ge=1)]
OrNone = Annotated[int, Field(ge=0, le=4096)]  # 0: found out


class Settings(BaseModel):
    """The operator's decisions. Frozen, checked as a whole, the same for client and worker."""

    # What is wrong is never shown: it may be a secret, or stand beside one.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # Queue and ledger
    broker_url: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379/0"  # it may hold a password
    ledger_url: Annotated[str, Field(repr=False)] = ""  # empty: where the broker is
    redis_ca: Place = None  # a PEM file: who may vouch for a rediss:// server; none: whom the system trusts
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
    image_schemes: Listed = ("s3",)
    image_buckets: BucketList = ("*",)  # "*": whatever the worker's credentials can read
    image_hosts: HostList = ()  # host, host:port or *.example.com, for http and https
    image_roots: Listed = ()  # folders, for file
    max_image_bytes: Count = 32 * 1024 * 1024
    max_image_pixels: Annotated[int, Field(ge=1, le=2**28)] = 64_000_000  # no decoder here takes more
    max_image_side: Count = 32_767  # pixels
    max_image_damage: Annotated[float, Field(ge=0, le=1)] = (
        0.05  # share of an image that is missing, at which it is refused; with less it is explained, with the
        # warning image_damaged. 0 refuses any image of which something is missing, 1 only one of which
        # nothing can be decoded
    )
    max_data_uri_bytes: Count = 256 * 1024
    fetch_timeout_s: Seconds = 20  # for the whole of one image
    max_classes: Count = 50  # explained in one job
    private_networks: NetworkList = ()  # as 10.0.0.0/8: where these hosts may lead, too
    max_bytes_in_flight: Count = 512 * 1024 * 1024  # of images read and not yet decoded, in one process
    max_pixels_in_flight: Count = 256_000_000  # of decoded images, in one process

    # Storage
    output: str = "s3://gradcam/results"  # where artifacts go unless the job says otherwise
    output_prefixes: Listed = ()  # where else a job may send them
    uploads: str = ""  # where `GradcamClient.upload_and_submit` puts images; empty: it has to be told
    s3_endpoint_url: S3Server = ""  # empty: Amazon
    s3_public_url: S3Server = (
        ""  # the same server as browsers reach it, for presigned URLs; empty: the endpoint
    )
    s3_region: str = ""  # empty: AWS_REGION, AWS_DEFAULT_REGION, us-east-1
    s3_access_key_id: str = ""  # empty: the usual AWS places
    s3_secret_access_key: SecretStr = SecretStr("")

    # Status
    webhook_hosts: HostList = ()  # host, host:port or *.example.com
    webhook_timeout_s: Seconds = 10
    webhook_give_up_s: Seconds = 3 * 86_400  # of trying, then the event is parked
    webhook_secrets: SigningSecrets = SecretStr("")  # app1=whsec_new whsec_old,app2=whsec_...
    couriers: Count = 4  # events on their way at once, from one process
    status_sql_url: Database = SecretStr("")  # of a database that is told, too: see `_database`
    status_sql_retention_s: Retention = 90 * 86_400

    # Networks
    networks: Place = (
        None  # a TOML file that describes the operator's own: see `gradcam_worker.gradcam.models.registry`
    )
    cache_bytes: Count = 32 * 1024**3  # of their files: the least recently used makes room
    cache_dir: Place = None  # for their files, by checksum; none: the user's own cache
    weights_dir: Place = None  # a folder of weights for the catalog's networks
    precision: Literal["float32", "tf32", "bfloat16", "mixed_bfloat16"] = "float32"
    exact_backward: bool = False  # the whole way back, where a shorter one gives the same
    resident_bytes: Count = 8 * 1024**3  # of all networks in memory: the least recently used makes room

    # The device
    devices: Annotated[str, BeforeValidator(_devices)] = (
        "auto"  # every GPU there is, a process for each; or their numbers, 0,1; or cpu
    )
    max_batch: Annotated[int, Field(ge=0, le=256)] = (
        0  # images in one pass; 0: as many as prove worth it when a network is warmed
    )
    batch_wait_s: Annotated[float, Field(ge=0, le=1)] = (
        0.01  # that a batch waits for jobs on their way, at most
    )
    intra_op_threads: OrNone = 0  # of one operation on the CPU; 0: one for each core

    # Worker
    preload: Listed = ()  # networks to load before the first job
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
    traces: Endpoint = ""  # where spans go, by OTLP/HTTP, as http://collector:4318; empty: nowhere

    @model_validator(mode="after")
    def _possible(self) -> Self:
        schemes, secret = set(self.image_schemes), self.s3_secret_access_key.get_secret_value()
        web = bool({"http", "https"} & schemes)
        findings = [
            (
                schemes - set(SCHEMES),
                f"image_schemes may hold {', '.join(SCHEMES)}; not all of {sorted(schemes)}",
            ),
            (
                web and not self.image_hosts,
                "image_schemes allows http or https, but image_hosts names no host",
            ),
            (
                "file" in schemes and not self.image_roots,
                "image_schemes allows file, but image_roots names no folder",
            ),
            (
                bool(self.s3_access_key_id) != bool(secret),
                "s3_access_key_id and s3_secret_access_key must be given together",
            ),
        ]
        if self.redis_ca:
            findings.append((not self.redis_ca.is_file(), f"redis_ca {str(self.redis_ca)!r} is not a file"))
        for name, text in (("broker_url", self.broker_url), ("ledger_url", self.ledger)):
            wrong = _no_redis(text)
            findings.append((bool(wrong), f"{name} {wrong}"))
        places = [("output", uri) for uri in (self.output, *self.output_prefixes)]
        for name, uri in [*places, ("uploads", self.uploads or self.output)]:
            findings.append((not is_place(uri), f"{name} {without_secrets(uri)!r} {PLACE_LOOKS}"))
        for holds, message in findings:
            if holds:
                raise ValueError(message)
        return self

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
        """Read `GRADCAM_*`; what a command line says, as `options`, comes first, unless it is None.

        Raises InvalidSettings, naming the variable and what would be right.
        """
        variables = os.environ if environment is None else environment
        given = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in variables.items()
            if name.startswith(PREFIX) and not _is_service_link(name, value)
        }
        for name in given.keys() - cls.model_fields.keys():
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f" Did you mean {PREFIX}{near[0].upper()}?" if near else ""
            message = f"There is no setting {PREFIX}{name.upper()}.{hint}"
            raise InvalidSettings(message)
        return cls._of(given, options)

    def changed(self, **options: str | None) -> Self:
        """These settings, and what `options` say, unless it is None. Raises InvalidSettings."""
        return self._of(dict(self), options)

    @classmethod
    def _of(cls, given: Mapping[str, Any], options: Mapping[str, str | None]) -> Self:
        said = {name: value for name, value in options.items() if value is not None}
        try:
            return cls.model_validate({**given, **said})
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[0]
            place = PREFIX + str(found["loc"][0]).upper() + ": " if found["loc"] else ""
            raise InvalidSettings(place + found["msg"].removeprefix("Value error, ")) from error

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
            plain[PREFIX + name.upper()] = text
        return plain

    def environment_for_child(self) -> dict[str, str]:
        """This process's environment with these settings in it, whole."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return others | self.to_environment()


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


def _is_database(text: str) -> bool:
    scheme, _, rest = text.partition("://")
    if scheme == "sqlite":  # in a file: what is in memory nobody else can read
        return rest.startswith("/") and rest not in {"/", "//", "/:memory:"} and "?" not in rest
    found = urls.parse(text)
    if not found or found.port == 0 or found.fragment is not None:
        return False
    return scheme in {"postgresql", "postgresql+psycopg"} and bool(found.path.strip("/"))


def _no_redis(text: str) -> str:
    """Why this is no URL of one Redis server, without what may be secret in it; empty where it is one."""
    scheme, slashes, rest = text.partition("://")
    shown = without_secrets(text) if slashes else "..."  # what is no URL may be a password
    place = re.split("[/?#]", rest)[0].rpartition("@")[2]
    for word in ("cluster", "sentinel"):
        if word in scheme.lower():
            return f"{shown!r} is that of a Redis {word.title()}, which is not supported: {ONE_SERVER}"
    if re.search("[,;]", place) or re.search(r"[,;]\s*\w+://", text):
        return f"{shown!r} names several servers: {ONE_SERVER}"
    found = urls.parse(text)
    database = found.path.strip("/") if found else ""
    if (
        found
        and found.scheme in {"redis", "rediss"}
        and found.host
        and found.port != 0
        and not found.query
        and found.fragment is None
        and (not database or database.isdecimal())
    ):
        return ""
    hidden = f"; {urls.ENCODE}" if "@" in text else ""
    return f"{shown!r} must look like redis://host:6379/0 (or rediss://), without ?options{hidden}"
