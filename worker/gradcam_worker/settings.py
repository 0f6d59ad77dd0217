"""All settings, `GRADCAM_*`, read from the environment by pydantic-settings.

Lists are separated by commas: `GRADCAM_IMAGE_SCHEMES=s3,https`. An item that contains a comma is written in
double quotes. A JSON list of texts is read, too. The string below each field of `Settings` is its meaning in
docs/reference/settings.md.
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
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
    SettingsConfigDict,
)

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.net import allowlist, ip_policy
from gradcam_worker.net.webhook_signing import parse_secrets
from gradcam_worker.schemas import bucket_names
from gradcam_worker.text import comma_lists, sentinel_urls, urls
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import visible

PathOrText = TypeVar("PathOrText", Path, str)

PREFIX = "GRADCAM_"
STORAGE_URI_FORM = "must look like s3://bucket/prefix or file:///folder, without a user or a password"
ONE_SERVER = (
    "name one server, or one address that leads to the master, as redis://host:6379/0, or the Sentinels of a "
    "master, as sentinel://host:26379,host:26379/mymaster/0"
)
SCHEMES = ("s3", "https", "http", "file", "data")
REDIS_URL_FORM = "must look like redis://host:6379/0, or rediss:// for TLS"
REDIS_SCHEMES = ("redis", "rediss", *urls.SENTINEL_SCHEMES)
DATABASE_URL_FORM = "must look like sqlite:////folder/status.db or postgresql://user:password@host/database"
COLLECTOR_FORM = "must look like http://collector:4318"
S3_SERVER_FORM = "must look like https://s3.example.com:9000"
UNREADABLE_USER = "a user or a password that cannot be read as it is"
BAD_PORT = f"a port that is no number from 1 to {urls.MAX_PORT}"
UNREADABLE_STORAGE_CLASSES = {"GLACIER", "DEEP_ARCHIVE"}  # what is in them has to be restored first
OBJECT_TAG = re.compile(r"[\w .:/+@-]{1,128}=[\w .:/+=@-]{0,256}")  # as S3 allows
MAX_TAGS = 10  # of an object
AUTO: Literal["auto"] = "auto"
MAX_JOB_PROCESSES = 256
MAX_SHOWN_LENGTH = 100  # characters of a received value in an error message
# Suffixes and values of the variables that Kubernetes sets in each pod for each Service of its namespace
# (enableServiceLinks), and Docker for each linked container. Those of a Service called gradcam-x begin with
# GRADCAM_, too. No setting has both such a name and such a value.
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
    """Read a list of names, with commas or as JSON. `[fd00::1]:80` is a host, not JSON."""
    if not isinstance(value, str):
        return value
    items = None
    if value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            items = json.loads(value)
    if items is None:
        return comma_lists.parse(value)
    if not all(isinstance(item, str) for item in items):
        message = 'as a JSON list it must hold texts alone, as in ["vgg16", "xception"]'
        raise ValueError(message)
    return tuple(item.strip() for item in items if item.strip())


def _expand_home(path: PathOrText) -> PathOrText:
    """Replace `~` at the beginning by the user's home, as a shell does."""
    text = str(path)
    if text.startswith("~") and (expanded := os.path.expanduser(text)) != text:  # noqa: PTH111  # keeps texts as they are
        return type(path)(expanded)
    if text.startswith("~"):
        message = f"{text!r} names a user who has no home: write the whole path"
        raise ValueError(message)
    return path


def _origins(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        url = urls.parse(text)
        problem = _url_problem(text, repr(without_secrets(text)), ("http", "https"))
        if problem or not url or url.has_user or url.path or url.query or url.fragment is not None:
            message = f"{without_secrets(text)!r} must be a web origin alone, as https://app.example.com:8443"
            raise ValueError(message)
    return tuple(text.lower() for text in texts)


def _folders(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_expand_home, paths))


def _devices(value: Any) -> Any:
    """Remove spaces; an empty text means auto."""
    devices = str(value).replace(" ", "") or "auto"
    if not re.fullmatch(r"auto|cpu|[0-9]{1,3}(,[0-9]{1,3})*", devices):
        message = f"{value!r} must be auto, cpu, or the numbers of GPUs, as in 0,1"
        raise ValueError(message)
    return devices


def _job_processes(value: Any) -> Any:
    """Refuse what is no such number, in one sentence; an empty text means auto."""
    text = str(value) or AUTO
    if text != AUTO and not (re.fullmatch(r"[0-9]{1,3}", text) and int(text) <= MAX_JOB_PROCESSES):
        message = f"{value!r} must be auto, or a number from 0 to {MAX_JOB_PROCESSES}"
        raise ValueError(message)
    return text if text == AUTO else int(text)


def _webhook_secrets(value: SecretStr) -> SecretStr:
    parse_secrets(value.get_secret_value())
    return value


def _database_url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text and (problem := _database_problem(text)):
        raise ValueError(problem)
    return value


def _redis_url(text: str) -> str:
    of_sentinels = "sentinel" in text.partition("://")[0].lower()
    if problem := _sentinel_problem(text) if of_sentinels else _redis_problem(text):
        raise ValueError(problem)
    return text


def _s3_server(text: str) -> str:
    if problem := _s3_server_problem(text):
        raise ValueError(problem)
    return text


def _storage_class(text: str) -> str:
    if not re.fullmatch("[A-Z][A-Z0-9_]{0,63}", text):
        message = f"{text[:MAX_SHOWN_LENGTH]!r} must look like STANDARD_IA"
        raise ValueError(message)
    if text in UNREADABLE_STORAGE_CLASSES:
        message = f"{text!r} cannot be read back at once, as a worker must: write GLACIER_IR for an archive"
        raise ValueError(message)
    return text


def _object_tags(texts: tuple[str, ...]) -> tuple[str, ...]:
    names = [text.partition("=")[0] for text in texts]
    wrong = [text for text in texts if not OBJECT_TAG.fullmatch(text)]
    if wrong or len(set(names)) < len(names) or len(names) > MAX_TAGS:
        message = (
            f"{(wrong or [comma_lists.join(texts)])[0][:MAX_SHOWN_LENGTH]!r} must look like "
            f"team=vision,cost-centre=42, with {MAX_TAGS} names at most, each once"
        )
        raise ValueError(message)
    return texts


def _traces_url(text: str) -> str:
    if problem := _url_problem(text, _shown(text), ("http", "https")):
        message = f"{problem}: it {COLLECTOR_FORM}"
        raise ValueError(message)
    return text


def _storage_uri(text: str) -> str:
    if not is_storage_uri(text):
        message = f"{without_secrets(text)!r} {STORAGE_URI_FORM}"
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
    """What is wrong with the URL of a Redis server, without possible secrets; None if it is valid."""
    scheme, _, rest = text.partition("://")
    shown = _shown(text)
    host = re.split("[/?#]", rest)[0].rpartition("@")[2]
    if "cluster" in scheme.lower():
        return f"{shown} is that of a Redis Cluster, which is not supported: {ONE_SERVER}"
    if re.search("[,;]", host) or re.search(r"[,;]\s*\w+://", text):
        return f"{shown} names several servers: {ONE_SERVER}"
    problem = _url_problem(text, shown, REDIS_SCHEMES)
    url = urls.parse(text)
    if problem or not url:
        return f"{problem}: it {REDIS_URL_FORM}"
    database = url.path.strip("/")
    what, hint = None, _encoding_hint(text)
    if url.query:
        what = f"options behind a ?, which are not supported: it {REDIS_URL_FORM}{hint}"
    elif not urls.is_readable(text):
        what = f"{UNREADABLE_USER}{hint}"
    elif database and not database.isdecimal():
        what = f"the path {url.path!r}: it must be the number of a database, as /0"
    return what and f"{shown} has {what}"


def _sentinel_problem(text: str) -> str | None:
    """What is wrong with the URL of a Sentinels' master, without possible secrets; None if it is valid."""
    shown = _shown(text)
    try:
        if not sentinel_urls.is_sentinel_url(text):
            return f"{shown} has another scheme than {' or '.join(REDIS_SCHEMES)}: it {sentinel_urls.FORM}"
        if not urls.is_readable(sentinel_urls.parse(text).server_url):
            return f"{shown} has {UNREADABLE_USER}{_encoding_hint(text)}"
    except ValueError as error:
        return f"{shown} {error}: it {sentinel_urls.FORM}{_encoding_hint(text)}"
    return None


def _database_problem(text: str) -> str | None:
    """What is wrong with the URL of a status database, without possible secrets; None if it is valid."""
    scheme, _, rest = text.partition("://")
    if scheme == "sqlite":  # a file: another process cannot read a database in memory
        valid = rest.startswith("/") and rest not in {"/", "//", "/:memory:"} and "?" not in rest
        return None if valid else f"it names no file of SQLite: it {DATABASE_URL_FORM}"
    if scheme != scheme.lower():  # SQLAlchemy tells them apart
        return f"its scheme is not in lower case: it {DATABASE_URL_FORM}"
    problem = _url_problem(text, "it", ("postgresql", "postgresql+psycopg"), host_needed=False)
    url = urls.parse(text)
    if not problem and url and not url.path.strip("/"):
        problem = "it names no database behind the host"
    return problem and f"{problem}: it {DATABASE_URL_FORM}; {urls.ENCODE}"


def _s3_server_problem(text: str) -> str | None:
    """What is wrong with the URL of an S3 server; None if it is valid.

    A user is refused: S3 does not use it, and presigned URLs would show it.
    """
    url = urls.parse(text)
    in_path = bool(url and "@" in url.path)  # the text before it may be a user and half a password
    shown = repr(f"{text.partition('://')[0]}://..." if in_path else without_secrets(text))
    if url and (url.has_user or in_path or url.query):
        keys = "GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY"
        return f"{shown} must be scheme, host and port alone: user and password are {keys}"
    problem = _url_problem(text, shown, ("http", "https"))
    return problem and f"{problem}: it {S3_SERVER_FORM}"


def _shown(text: str) -> str:
    """A URL for a message. What has no scheme is shown only if it is an address: it may be a password."""
    return repr(without_secrets(text) if not text or "://" in text or urls.is_address(text) else "...")


def _url_problem(text: str, shown: str, schemes: tuple[str, ...], *, host_needed: bool = True) -> str | None:
    """Which part of a URL is wrong: its scheme, host, port or fragment; None if all are valid."""
    scheme, slashes, _ = text.partition("://")
    if not slashes:
        return f"{shown} has no scheme"
    if scheme.lower() not in schemes:
        return f"{shown} has another scheme than {' or '.join(schemes)}"
    url = urls.parse(text)
    if not url:
        return f"{shown} has {_unreadable_part(text)}"
    if host_needed and not url.host:
        return f"{shown} names no host"
    if url.port == 0:
        return f"{shown} has {BAD_PORT}"
    return None if url.fragment is None else f"{shown} has a part behind a #{_encoding_hint(text)}"


def _unreadable_part(text: str) -> str:
    """Which part of a URL `urls.parse` cannot read. Its text may be a password, so it is not shown."""
    rest = text.partition("://")[2]
    authority = re.split("[/?#]", rest)[0]
    if "@" in rest[len(authority) :]:
        return f"an @ behind its host{_encoding_hint(text)}"
    port = re.search(r":([^:\]]*)\Z", authority.rpartition("@")[2])
    if port and not (port[1].isdecimal() and int(port[1]) <= urls.MAX_PORT):
        return BAD_PORT
    return f"a host that cannot be read{_encoding_hint(text)}"


def _encoding_hint(text: str) -> str:
    """How to encode a password, if one may be the cause."""
    return f" ({urls.ENCODE})" if "@" in text else ""


RedisUrl = Annotated[str, AfterValidator(_redis_url), Field(repr=False)]  # it may hold a password
OptionalRedisUrl = Annotated[str, _unless_empty(_redis_url), Field(repr=False)]
WebhookSecrets = Annotated[SecretStr, AfterValidator(_webhook_secrets)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
StringList = Annotated[tuple[str, ...], BeforeValidator(_split)]
SchemeList = Annotated[StringList, AfterValidator(_schemes)]
HostList = Annotated[StringList, AfterValidator(allowlist.normalize)]
OriginList = Annotated[StringList, AfterValidator(_origins)]
NetworkList = Annotated[StringList, AfterValidator(ip_policy.normalize)]
BucketList = Annotated[StringList, AfterValidator(_bucket_names)]
StorageUri = Annotated[str, AfterValidator(_storage_uri)]
OptionalStorageUri = Annotated[str, _unless_empty(_storage_uri)]
StorageUriList = Annotated[StringList, AfterValidator(_storage_uris)]
FolderList = Annotated[StringList, AfterValidator(_folders)]
OptionalPath = Annotated[
    Path | None,
    BeforeValidator(lambda value: value or None),
    AfterValidator(lambda path: path and _expand_home(path)),
]
PemFile = Annotated[OptionalPath, AfterValidator(_file)]
TracesUrl = Annotated[str, _unless_empty(_traces_url), Field(repr=False)]  # it may hold a password
S3ServerUrl = Annotated[str, _unless_empty(_s3_server)]
StorageClass = Annotated[str, _unless_empty(_storage_class)]
ObjectTags = Annotated[StringList, AfterValidator(_object_tags)]
Devices = Annotated[str, BeforeValidator(_devices)]
JobProcesses = Annotated[
    Annotated[int, Field(ge=0, le=MAX_JOB_PROCESSES)] | Literal["auto"], BeforeValidator(_job_processes)
]
Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]
Retention = Annotated[float, Field(ge=60, le=3650 * 86_400)]  # seconds
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
CountOrAuto = Annotated[int, Field(ge=0, le=4096)]  # 0: chosen by the program


class EnvironmentSource(EnvSettingsSource):
    """Reads `GRADCAM_*` of an environment, without variables that Kubernetes and Docker set."""

    def __init__(self, settings_cls: type[BaseSettings], environment: Mapping[str, str]) -> None:
        """`environment` is read once, here."""
        super().__init__(settings_cls)
        self._variables = {
            name: value
            for name, value in environment.items()
            if name.startswith(PREFIX) and not _is_service_link(name, value)
        }
        self.env_vars = {name.lower(): value for name, value in self._variables.items()}

    def __call__(self) -> dict[str, Any]:
        """Return what is set, as text: to ask for each field, as the library does, takes milliseconds."""
        values = {name.removeprefix(PREFIX.lower()): value for name, value in self.env_vars.items()}
        return {name: value for name, value in values.items() if name in self.settings_cls.model_fields}

    def problems(self) -> Iterable[str]:
        """An error message for each variable that is not a setting, and for each that has several values."""
        return [*self._unknown_variables(), *self._contradictions()]

    def _contradictions(self) -> Iterable[str]:
        """Upper and lower case are the same setting: none of two values is right."""
        for variable in self.env_vars:
            spellings = sorted(name for name in self._variables if name.lower() == variable)
            if len({self._variables[name] for name in spellings}) > 1:
                yield f"{' and '.join(spellings)} are the same setting with different values: keep one."

    def _unknown_variables(self) -> Iterable[str]:
        fields = self.settings_cls.model_fields
        for variable in self.env_vars:
            name = variable.removeprefix(PREFIX.lower())
            if name not in fields:
                matches = difflib.get_close_matches(name, fields, n=1)
                hint = f" Did you mean {_variable(matches[0])}?" if matches else ""
                yield f"{visible(_variable(name))}: there is no such setting.{hint}"


class Settings(BaseSettings):
    """The settings of a client, a worker or a command: immutable and validated.

    `Settings(...)` takes values by keyword and reads no environment; `from_environment` reads `GRADCAM_*`.

    Examples:
        >>> Settings(broker_url="redis://queue:6379/0", threads=4).threads
        4
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        enable_decoding=False,  # lists are separated by commas, not written as JSON
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # it may be or contain a secret
    )

    # Queue and ledger
    broker_url: RedisUrl = "redis://127.0.0.1:6379/0"
    """Redis or Valkey that holds the queue: `redis://`, `sentinel://`, or by TLS `rediss://`, `sentinels://`"""
    ledger_url: OptionalRedisUrl = ""
    """Redis or Valkey that holds the ledger; none: the broker's"""
    redis_ca: PemFile = None
    """PEM file of the certificate authority of the servers by TLS; none: the system's authorities"""
    sentinel_user: str = ""
    """user of the Sentinels themselves; none: their default user"""
    sentinel_password: SecretStr = SecretStr("")
    """password of the Sentinels themselves, which need not be the server's; none: they require none"""
    submit_replicas: Annotated[int, Field(ge=0, le=100)] = 0
    """how many replicas of the ledger's server must have a job before it is accepted (`WAIT`)"""
    key_prefix: str = "gradcam:"
    """prefix of every key in Redis"""
    visibility_timeout_s: Annotated[float, Field(ge=2, le=86_400)] = 900
    """how long a message may stay unacknowledged before it returns to the queue"""
    retention_s: Retention = 7 * 86_400
    """how long the status of a final job can be read"""
    idempotency_retention_s: Retention = 7 * 86_400
    """how long the status of a final job with an idempotency key can be read, if longer"""
    lease_s: Annotated[float, Field(ge=1, le=300)] = 15
    """how long a running job belongs to its worker unless the worker renews the lease"""
    lost_after_s: Annotated[float, Field(ge=1, le=3600)] = 20
    """how long a queued job may have no message before it is published again"""
    max_message_bytes: Count = 1024 * 1024
    """size of a job as JSON"""

    # Images
    image_schemes: SchemeList = ("s3",)
    """URI schemes that a job's image may have: `s3`, `https`, `http`, `file`, `data`"""
    image_buckets: BucketList = ("*",)
    """for `s3`: the allowed buckets; `*`: every bucket that the credentials can read"""
    image_hosts: HostList = ()
    """for `http` and `https`: the allowed hosts, as `host`, `host:port`, `[IPv6]:port` or `*.example.com`"""
    image_roots: FolderList = ()
    """for `file`: the allowed folders"""
    max_image_bytes: Count = 32 * 1024 * 1024
    """size of an image file"""
    max_image_pixels: Annotated[int, Field(ge=1, le=2**28)] = (
        64_000_000  # no decoder here takes more than 2**28
    )
    """width times height of an image"""
    max_image_side: Count = 32_767
    """longer side of an image, in pixels"""
    max_image_damage: Share = 0.05
    """share of a damaged image that may be missing: an image with more is refused, one with less is explained
    with a warning; 0 refuses every damaged image, 1 only those that are missing entirely
    """
    convert_colors: bool = True
    """convert images to sRGB whose file says that their colours are others (an ICC profile; cICP, gAMA and
    cHRM of a PNG); `false`: take every image as sRGB, as most training pipelines do
    """
    max_data_uri_bytes: Count = 256 * 1024
    """size of a `data:` URI"""
    fetch_timeout_s: Seconds = 20
    """time to read one image"""
    max_classes: Count = 50
    """classes explained in one job"""
    private_networks: NetworkList = ()
    """networks besides public addresses to which image hosts and webhooks may resolve, as
    `10.0.0.0/8,fd00::/8`; with IPv6 only, add NAT64's `64:ff9b::/96`
    """
    max_bytes_in_flight: Count = 512 * 1024 * 1024
    """bytes of images that are read and not yet decoded, in one process; the default is divided among job
    processes, as is that of pixels
    """
    max_pixels_in_flight: Count = 256_000_000
    """pixels of decoded images, in one process"""

    # Storage
    output: StorageUri = "s3://gradcam/results"
    """where artifacts are stored unless the job says otherwise: `s3://bucket/prefix` or `file:///folder`"""
    output_prefixes: StorageUriList = ()
    """further prefixes where a job's own `output` may be"""
    uploads: OptionalStorageUri = ""
    """where `upload_and_submit` and `gradcam demo --against-running` store images"""
    s3_endpoint_url: S3ServerUrl = ""
    """the S3 server; none: that of `AWS_ENDPOINT_URL_S3` or a profile, else Amazon's"""
    s3_public_url: S3ServerUrl = ""
    """the S3 server as browsers reach it, for presigned URLs; none: the endpoint"""
    s3_region: str = ""
    """region of the buckets; none: `AWS_REGION`, `AWS_DEFAULT_REGION` or `us-east-1`"""
    s3_access_key_id: str = ""
    """access key; none: from the AWS environment variables, profile or role"""
    s3_secret_access_key: SecretStr = SecretStr("")
    """secret of the access key"""
    s3_checksum: Literal["auto", "sha256"] = "auto"
    """checksum of what is written: `sha256`; `auto`: only in buckets that have asked for one"""
    s3_sse: Literal["", "AES256", "aws:kms", "aws:kms:dsse"] = ""
    """how S3 encrypts what is written: `AES256`, `aws:kms`, `aws:kms:dsse`; none: as the bucket says"""
    s3_sse_kms_key_id: str = ""
    """KMS key that encrypts what is written, by id, ARN or alias; none: the bucket's, or S3's own"""
    s3_request_payer: Literal["", "requester"] = ""
    """`requester`: whoever owns the keys pays for requests to buckets of others"""
    s3_storage_class: StorageClass = ""
    """storage class of what is written, as `STANDARD_IA`; none: the bucket's"""
    s3_tags: ObjectTags = ()
    """tags of what is written, as `team=vision,cost-centre=42`; at most 10"""

    # Status
    webhook_hosts: HostList = ()
    """receivers that a job may name, written as in `GRADCAM_IMAGE_HOSTS`"""
    webhook_timeout_s: Seconds = 10
    """time for one answer of a receiver"""
    webhook_give_up_s: Seconds = 3 * 86_400
    """how long delivery of an event is retried before it is parked"""
    webhook_secrets: WebhookSecrets = SecretStr("")
    """signing secrets by name, as `app1=whsec_new whsec_old,app2=whsec_...`; two secrets of a name while one
    replaces the other
    """
    couriers: Count = 4
    """deliveries at a time, of one process"""
    status_sql_url: DatabaseUrl = SecretStr("")
    """database that receives every status document: `postgresql://user:password@host/database` or
    `sqlite:////folder/status.db` (extra `sql`)
    """
    status_sql_retention_s: Retention = 90 * 86_400
    """how long a final job's row stays in the database"""

    # Networks
    networks: OptionalPath = None
    """TOML file of your own networks"""
    cache_bytes: Count = 32 * 1024**3
    """size of the folder of your networks' files; the least recently used is removed"""
    cache_dir: OptionalPath = None
    """folder of your networks' files, by checksum; none: `~/.cache/gradcam-worker`"""
    weights_dir: OptionalPath = None
    """folder with weights of the catalog's networks"""
    precision: Literal["float32", "tf32", "bfloat16", "mixed_bfloat16"] = "float32"
    """floating-point format of the networks' arithmetic"""
    forward: Literal["auto", "openvino", "tensorflow"] = "auto"
    """what computes the forward pass of Grad-CAM on a CPU: `openvino` (extra `openvino`), `tensorflow`, or
    `auto`: OpenVINO where it is installed and agrees with TensorFlow to 1e-5
    """
    exact_backward: bool = False
    """compute the whole backward pass, even where a shorter one gives the same result"""
    resident_bytes: Count = 8 * 1024**3
    """memory of all loaded networks; the least recently used is unloaded"""

    # The device
    devices: Devices = "auto"
    """`auto`: a process for each GPU; or their numbers, as `0,1`; or `cpu`"""
    max_batch: Annotated[int, Field(ge=0, le=256)] = 0
    """images in one batch; 0: measured when a network is loaded"""
    batch_wait_s: Annotated[float, Field(ge=0, le=1)] = 0.01
    """how long a batch waits at most for jobs that are about to join it"""
    intra_op_threads: CountOrAuto = 0
    """threads of one TensorFlow operation on the CPU; 0: one for each core"""

    # Worker
    job_processes: JobProcesses = AUTO
    """processes of each device that fetch, decode, draw and upload, while one more process computes; 0: one
    process does both; `auto`: for a GPU one for each core but one of its share, at most 16, else 0
    """
    one_core: bool = True
    """keep each job process on one core at a time, an idle one if there is any: it takes less CPU time. Not
    by default where there are fewer cores than processes
    """
    engine_pool_bytes: Annotated[int, Field(ge=2**20)] = 128 * 1024 * 1024
    """memory in which one job process hands pixels to the engine process: if it is full, jobs wait"""
    role: Literal["worker", "engine", "jobs"] = "worker"
    """set by the supervisor: what this process does, `worker` is both"""
    engine_socket: OptionalPath = None
    """set by the supervisor: the socket of the engine process"""
    preload: StringList = ()
    """networks to load before the first job"""
    threads: Count = 16  # twice the size of a batch on the CPU
    """jobs at a time, of each process; the default is 16 for each device, 64 for a GPU, divided among its
    job processes
    """
    shards: Count = 2  # one is read while another is computed
    """shards of backfills at a time, of each process, besides those jobs"""
    retry_backoff_s: Seconds = 1
    """delay before the second attempt; doubles, with jitter"""
    retry_backoff_max_s: Seconds = 60
    """longest delay between two attempts"""
    shutdown_timeout_s: Seconds = 90
    """time for running jobs after SIGTERM; then they are requeued"""
    stalled_after_s: Annotated[float, Field(ge=5, le=3600)] = 60
    """how long a worker process may be unresponsive before it is restarted"""
    hung_after_s: Annotated[float, Field(ge=60, le=7 * 86_400)] = 3600
    """how long running jobs may make no progress while others wait, before the worker process is restarted"""
    memory_bytes: Annotated[int, Field(ge=0)] = 0
    """memory limit of a process; 0: none. With the defaults, a CPU worker needs at least 6.2 GB"""
    starts: Count = 1
    """set by the supervisor: how often the worker of this device was started"""
    stderr_pipe: StringList = ()
    """set by the supervisor: file descriptors of a pipe for what native code writes to standard error"""

    # HTTP API
    serve_origins: OriginList = ()
    """web origins whose pages may call the API from a browser (CORS), as `https://app.example.com`"""
    serve_open_requests: Count = 1000
    """requests that wait for a job, and event streams, at a time; further ones are answered 503"""

    # Logs, metrics and traces
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """port of `/metrics`, `/live`, `/ready` and `/startup`; process N of a machine has this port + N, or this
    one port serves for all where there are job processes; 0: not served
    """
    metrics_socket: OptionalPath = None
    """set by the supervisor: where this process serves them instead, for the supervisor"""
    metrics_host: str = "127.0.0.1"
    """address to listen at; `0.0.0.0`: every address of IPv4; `::`: every one, of IPv6, too"""
    log_format: Literal["text", "json"] = "text"
    """`text`: lines for a person; `json`: one object a line"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """least severe level that is logged"""
    traces: TracesUrl = ""
    """OTLP/HTTP collector, as `http://collector:4318` (extra `otel`)"""

    def __init__(self, **values: Any) -> None:
        """Take values by keyword: see `from_environment` for those of an environment.

        `BaseSettings.__init__` would build a source of each kind, at a hundred times the cost, to use none.
        """
        BaseModel.__init__(self, **values)

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: Any) -> Any:
        """Remove whitespace around any value: a Kubernetes secret made by `echo` ends with a line break."""
        return value.strip() if isinstance(value, str) else value

    @field_validator("image_hosts")
    @classmethod
    def _require_image_hosts(cls, hosts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not hosts and {"http", "https"} & set(info.data.get("image_schemes", ())):
            message = "it names no host, but GRADCAM_IMAGE_SCHEMES allows http or https: write host:port"
            raise ValueError(message)
        return hosts

    @field_validator("image_roots")
    @classmethod
    def _require_image_roots(cls, roots: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not roots and "file" in info.data.get("image_schemes", ()):
            message = "it names no folder, but GRADCAM_IMAGE_SCHEMES allows file: name the folders of images"
            raise ValueError(message)
        return roots

    @field_validator("s3_secret_access_key")
    @classmethod
    def _require_key_with_secret(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr:
        if bool(secret.get_secret_value()) != bool(info.data.get("s3_access_key_id")):
            message = "it and GRADCAM_S3_ACCESS_KEY_ID must be given together"
            raise ValueError(message)
        return secret

    @field_validator("s3_sse_kms_key_id")
    @classmethod
    def _require_kms(cls, key_id: str, info: ValidationInfo) -> str:
        if key_id and not info.data.get("s3_sse", "").startswith("aws:kms"):
            message = "it needs GRADCAM_S3_SSE=aws:kms, or aws:kms:dsse"
            raise ValueError(message)
        return key_id

    @property
    def s3_tags_by_name(self) -> dict[str, str]:
        """The tags of what is written to S3."""
        return {name: value for name, _, value in (tag.partition("=") for tag in self.s3_tags)}

    @property
    def ledger(self) -> str:
        """The ledger's URL."""
        return self.ledger_url or self.broker_url

    @property
    def has_one_server(self) -> bool:
        """Whether queues and ledger are in one server: a job can be entered and published in one step."""
        return self.ledger == self.broker_url

    def redis_tls(self, text: str) -> dict[str, Any]:
        """Return redis-py's TLS options for a URL: verify the server. Empty for a URL without TLS."""
        if not text.casefold().startswith(("rediss:", "sentinels:")):
            return {}
        trust = {"ssl_ca_certs": str(self.redis_ca)} if self.redis_ca else {}
        return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **trust}

    @property
    def region(self) -> str:
        """The region of S3, and of the STS that issues its keys."""
        names = ("AWS_REGION", "AWS_DEFAULT_REGION")
        return next(filter(None, (self.s3_region, *map(os.environ.get, names))), "us-east-1")

    @property
    def cache(self) -> Path:
        """The folder for operators' model files. Raises InvalidSettings if the user has no home."""
        if self.cache_dir:
            return self.cache_dir
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the standard ignores relative paths
            return (base if base.is_absolute() else Path.home() / ".cache") / "gradcam-worker"
        except RuntimeError as error:
            message = "GRADCAM_CACHE_DIR must name a folder: this user has no home."
            raise InvalidSettings(message) from error

    @property
    def keras_home(self) -> Path:
        """Keras' folder for downloads. Raises InvalidSettings if the user has no home."""
        try:
            return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
        except RuntimeError as error:
            message = "KERAS_HOME must name a folder: this user has no home."
            raise InvalidSettings(message) from error

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **options: str | None) -> Self:
        """Read `GRADCAM_*` from the environment.

        Args:
            environment: Variables to read instead of those of this process.
            **options: Values that replace those of the environment, as from a command line, by the setting's
                name. Those that are None do not.

        Raises:
            InvalidSettings: A line for each wrong variable says what was received and what would be
                right.
        """
        source = EnvironmentSource(cls, os.environ if environment is None else environment)
        return cls._validated({**source(), **_without_none(options)}, source.problems())

    def changed(self, **options: str | None) -> Self:
        """Return a copy with other values; those that are None do not count. Raises InvalidSettings."""
        return self._validated({**dict(self), **_without_none(options)})

    @classmethod
    def _validated(cls, values: Mapping[str, Any], known_problems: Iterable[str] = ()) -> Self:
        """Settings with these values. Raises InvalidSettings for these and the known problems."""
        problems, cause = [*known_problems], None
        try:
            settings = cls(**values)
        except ValidationError as error:
            cause = error
            problems += [cls._problem(details) for details in error.errors(include_url=False)]
        if problems:
            raise InvalidSettings(*problems) from cause
        return settings

    @classmethod
    def _problem(cls, error: ErrorDetails) -> str:
        """Which variable is wrong, what was received, what would be right."""
        name = str(error["loc"][0])
        message = error["msg"].removeprefix("Value error, ")
        field = cls.model_fields.get(name)
        if error["type"] != "value_error":  # an error of pydantic's: ours already say what was received
            showable = isinstance(error["input"], str) and field and field.repr
            received = visible(without_secrets(error["input"])[:MAX_SHOWN_LENGTH]) if showable else "..."
            message = f"{received!r} was received: {message.replace('Input should', 'it should')}"
        stop = "" if message.endswith((".", "?")) else "."
        return f"{_variable(name)}: {message}{stop}"

    def to_environment(self) -> dict[str, str]:
        """Return the settings as `GRADCAM_*` variables, for a child process."""
        variables: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            text = (
                comma_lists.join(value) if isinstance(value, tuple) else "" if value is None else str(value)
            )
            variables[_variable(name)] = text
        return variables

    def environment_for_child(self) -> dict[str, str]:
        """Return this process's environment with all settings replaced by these."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return others | self.to_environment()


def _variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def _without_none(options: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker set the variable, for a Service or a container called `gradcam...`."""
    return any(
        re.fullmatch(rf"GRADCAM(_\w+?)?{suffix}", name) and re.fullmatch(form, value, re.DOTALL)
        for suffix, form in SERVICE_LINKS
    )


def is_storage_uri(uri: str) -> bool:
    """Return whether objects can be stored below this URI: `s3://bucket/prefix` or `file:///folder`."""
    scheme, _, rest = uri.partition("://")
    problem = bucket_names.describe_problem(rest.partition("/")[0]) if scheme == "s3" else None
    known = scheme in {"file", "s3"} and problem is None
    plain_path = bool(rest.strip("/")) and not {"?", "#"} & set(rest)
    return known and plain_path and not urls.has_credentials(uri)
