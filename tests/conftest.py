"""Fixtures that many tests use: photos, real servers and settings for them, a small HTTP server."""

import atexit
import contextlib
import gc
import logging
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import redis
import trustme
from pydantic import SecretStr

from gradcam_worker import extras
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.operations import servers
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings
from gradcam_worker.testing import TinyNetwork

SERVERS = {"valkey", "s3_server", "encrypted"}  # fixtures that start a program
# What takes half a minute or more, so that none of it is left for the end.
SLOW_WAITING = (
    "test_pages.py",
    "test_gateway.py",
    "test_typescript_example.py",
    "test_bench_testbed.py",
    "test_dev.py",
    "test_install.py",
    "test_rollout.py",
    "test_page.py",
    "test_turns.py",
    "test_tenants.py",
    "test_servers.py",
    "test_worst_days.py",
    "test_rehearsal.py",
    "test_mixed_fleet.py",
    "test_kill.py",
    "test_bench_river.py",
    "test_soak.py",
    "test_telemetry.py",
    "test_hostile_text.py",
    "test_backfill.py",
    "test_shards.py",
    "test_demo.py",
)
# What waits outside of those folders: for the ends of processes that it starts.
WAITING = {
    "tests/runtime/processes/test_supervisor.py",
    "tests/delivery/test_sql.py",
    "tests/docs/test_dataset.py",
    "tests/docs/test_site.py",
    "tests/architecture/test_imports.py",
    "tests/architecture/test_user_types.py",
}
SLOW_COMPUTING = (
    "test_bench.py",
    "test_backends.py",
    "test_imagenet_step.py",
    "test_every_network.py",
)
# What uses the worker of the fixture `stage` runs where test_pages.py does: each process would start its own.
USES_STAGE = {
    f"tests/live/{name}.py": "tests/live/test_pages.py"
    for name in ("test_queue_doc", "test_river", "test_start")
}
WAITING_FIRST = 2  # processes that begin with what waits
FOLDERS_OF_SERVERS = {"live", "faults", "devtools", "deploy"}
TENSORFLOW_HERE = {"gradcam", "audit"}  # folders whose tests use it in their own process


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `scripts/test --networks` run what the suite leaves to it: the tests marked `large`."""
    parser.addoption("--large", action="store_true", help="run the tests of large networks, and no others")


def pytest_configure() -> None:
    """Let Ctrl-C reach the programs that tests start, and keep TensorFlow's lines out of their logs.

    Let them, and this process, keep what they compile: else each of some hundred programs does it anew.

    A shell without job control starts background processes with SIGINT ignored, and children inherit that.
    They inherit TensorFlow's level of logging too, which JAX lowers where it is imported before ours.
    """
    atexit.register(gc.freeze)  # as commands do: pytest has searched for garbage by then
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without passes of the garbage collector: they took a third of the time and found nothing.

    Later passes leave out what was collected, which lives to the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of large networks to `--large`, and mark those that need a server.

    `scripts/test --fast` leaves the latter out.
    """
    wanted = bool(config.getoption("large"))
    left_out = [item for item in items if bool(item.get_closest_marker("large")) != wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in {*left_out}]
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & SERVERS or item.path.parent.name in FOLDERS_OF_SERVERS:
            item.add_marker(pytest.mark.server)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, from both ends: two processes begin with what waits, the others with what computes.

    So tests of real processes, which mostly wait, and the training of a network share the two cores; what is
    small comes last, wherever there is room. Not by the mark `xdist_group`: xdist 3.8 writes it into
    `_nodeid`, which pytest 9 does not read any more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FromBothEnds(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return USES_STAGE.get(path, path)

        def _reschedule(self, node: Any) -> None:
            super()._reschedule(node)
            if not (node.shutting_down or self.workqueue):
                node.shutdown()  # once it has run what it was given

        def _assign_work_unit(self, node: Any) -> None:
            if self.workqueue:
                nearest = min if self.nodes.index(node) < WAITING_FIRST else max
                path = nearest(self.workqueue, key=_place)
                self.workqueue.move_to_end(path, last=False)  # where the next one is taken from
                super()._assign_work_unit(node)

        def remove_node(self, node: Any) -> str | None:
            """As xdist does it, but the test at which a process died is not run by the next one too."""
            files = self.assigned_work.pop(node)
            crashed = next(
                (test for tests in files.values() for test, done in tests.items() if not done), None
            )
            if crashed:
                files[self._split_scope(crashed)][crashed] = True
                self.workqueue.update(
                    {path: tests for path, tests in files.items() if not all(tests.values())}
                )
                for other in self.nodes:
                    self._reschedule(other)
            return crashed

    return FromBothEnds(config, log)


def _place(path: str) -> tuple[int, int, str]:
    """Where a file stands between those that wait and those that compute; the slowest stand outermost."""
    package, _, name = path.removeprefix("tests/").rpartition("/")
    if package in {"live", "faults"}:
        return (0, SLOW_WAITING.index(name) if name in SLOW_WAITING else len(SLOW_WAITING), path)
    if path in WAITING:
        return (1, 0, path)
    computes = package.startswith(("gradcam", "devtools"))
    return (3 if computes else 2, SLOW_COMPUTING.index(name) if name in SLOW_COMPUTING else -1, path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Import TensorFlow as commands do: what it imports for others is two fifths of the time."""
    in_folder = item.path.relative_to(item.config.rootpath).parts[1] in TENSORFLOW_HERE
    if in_folder and item.get_closest_marker("tensorflow") and "keras" not in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extras, "_is_command", True)
            import_module("gradcam_worker.gradcam.backend")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape unpaired surrogates, which tests log on purpose: xdist cannot send them to its main process."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def _shared_boto3_data() -> Iterator[None]:
    """Let all S3 clients share boto3's data files: half of what a client costs is to parse them."""
    parsed: dict[Any, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        create_loader = botocore.session.create_loader

        def create_sharing_loader(search_path: str | None = None) -> Any:
            loader = create_loader(search_path)
            if search_path is None:
                loader._cache = parsed
            return loader

        patch.setattr(botocore.session, "create_loader", create_sharing_loader)
        yield


@pytest.fixture(autouse=True)
def _is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import TensorFlow as a user's program does, also after a test that runs a command in this process."""
    monkeypatch.setattr(extras, "_is_command", False)


@pytest.fixture(autouse=True)
def _restore_log_level() -> Iterator[None]:
    """Restore the logging level after a test that runs a command in this process."""
    ours = logging.getLogger("gradcam")
    before = ours.level
    yield
    ours.setLevel(before)


# Keys that may exist for ever, with any prefix. All other keys must have a time to live.
LASTING_KEYS = {
    r"(queued:\w+|retrying|running|expiring|canceling)": "ids of jobs that are not final",
    r"(dead|parked)": "ids that the reaper prunes",
    r"(outbox|lane:.+|waiting|down)": "recipients that have events to deliver",
    r"(gone|later)": "URLs, which are removed when their pause is over",
    r"claimed": "one field for each priority",
    r"(tenants|api_keys)": "what operators have made",
    r"(turn:\w+:.*|turns:\w+|rested:\w+)": "ids and tenants of queued jobs, and whose turn it is among them",
    r"workers": "one field for each worker, which is removed when the worker is gone",
    r"backfills": "ids of running backfills, which are removed when the backfill is gone",
    r"gradcam\.(interactive|bulk|shards)(\x06\x16\d)?": "a queue: messages that were not received",
    r"unacked(_index)?": "messages that were received and not acknowledged",
    r"_kombu\.binding(_permanent)?\..+": "the queues of an exchange of kombu",
    r"_kombu\.binding_deadlines": "when kombu removes bindings that are not used",
    r"unreadable:count": "one number",
}
LASTING = re.compile(rf"(.*:)?({'|'.join(LASTING_KEYS)})", re.DOTALL)
NEEDED = re.compile(r"(.*:|)(job|idempotency|events):([^:]+(?::[^:]+)?)", re.DOTALL)
FIND_WITHOUT_TTL = """
local found, cursor = {}, '0'
repeat
    local page = redis.call('SCAN', cursor, 'COUNT', 1000)
    cursor = page[1]
    for _, key in ipairs(page[2]) do
        if redis.call('PTTL', key) == -1 then found[#found + 1] = key end
    end
until cursor == '0'
return found
"""


REMOVE_OF_TEST = """
local removed, cursor = 0, '0'
repeat
    local page = redis.call('SCAN', cursor, 'COUNT', 1000)
    cursor = page[1]
    for _, key in ipairs(page[2]) do
        if string.sub(key, 1, #ARGV[1]) == ARGV[1] then removed = removed + redis.call('UNLINK', key) end
    end
until cursor == '0'
return removed
"""


class SharedServer:
    """A server that tests share, over one connection."""

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self._changes: object = None  # how many it had counted when its keys were looked at
        self._reported: set[str] = set()  # keys for which a test has failed already

    def new_keys_that_stay(self, prefix: str) -> list[str]:
        """Keys that stay and that no test has failed for. Those of the test that has ended are removed.

        Else each test would look through what all before it have left.

        Args:
            prefix: Of the keys of the test; empty: it has none of its own.
        """
        counts: Any = self.redis.info("persistence")
        if (changes := counts["rdb_changes_since_last_save"]) == self._changes:
            return []
        new = [key for key in keys_that_stay(self.redis) if key not in self._reported]
        self._reported.update(new)
        removed: Any = self.redis.eval(REMOVE_OF_TEST, 0, prefix) if prefix else 0
        self._changes = changes + removed
        return new


@pytest.fixture(scope="session")
def redis_servers() -> dict[int, str]:
    """The URLs of the servers that tests share, by port: see `_keys_expire`."""
    return {}


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[dict[str, SharedServer]]:
    """By URL."""
    found: dict[str, SharedServer] = {}
    yield found
    for server in found.values():
        server.redis.close()


@pytest.fixture(autouse=True)
def _keys_expire(
    redis_servers: dict[int, str], shared_servers: dict[str, SharedServer], request: pytest.FixtureRequest
) -> Iterator[None]:
    """Fail a test that leaves a key in Redis that would exist for ever."""
    yield
    prefix = key_prefix(request) if "settings" in request.fixturenames else ""
    for url in redis_servers.values():
        if url not in shared_servers:
            shared_servers[url] = SharedServer(url)
        new = shared_servers[url].new_keys_that_stay(prefix)
        assert not new, "keys without a time to live, which LASTING_KEYS does not name"


def key_prefix(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}:"


@pytest.fixture
def find_keys_that_stay() -> Callable[[str], list[str]]:
    """See `keys_that_stay`."""

    def find(url: str) -> list[str]:
        with redis.Redis.from_url(url, decode_responses=True) as server:
            return keys_that_stay(server)

    return find


def keys_that_stay(server: redis.Redis) -> list[str]:
    """Find the keys of a server that have no time to live and should have one."""
    lasting: Any = server.eval(FIND_WITHOUT_TTL, 0)
    found = remove_needed(server, [key for key in lasting if not LASTING.fullmatch(key)])
    return [key for key in found if server.pttl(key) == -1]  # a running worker may have set it meanwhile


def remove_needed(server: redis.Redis, keys: list[str]) -> list[str]:
    """Leave out the keys of jobs that are not final, and of recipients that have events to deliver."""
    named = {key: found.groups() for key in keys if (found := NEEDED.fullmatch(key))}
    with server.pipeline(transaction=False) as pipeline:
        for key, (_, kind, _) in named.items():
            pipeline.get(key) if kind == "idempotency" else pipeline.echo("")
        job_ids = pipeline.execute()
        for (prefix, kind, name), job_id in zip(named.values(), job_ids, strict=True):
            if kind == "events":
                pipeline.hexists(f"{prefix}waiting", name)
            else:
                pipeline.hget(f"{prefix}job:{job_id or name}", "place")
        needed = dict(zip(named, pipeline.execute(), strict=True))
    return [key for key in keys if needed.get(key) in {None, False, "", "dead"}]


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of the five shipped photos."""
    return DATA / "photos"


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory, redis_servers: dict[int, str]) -> Iterator[str]:
    """The URL of a real Valkey."""
    with servers.valkey(tmp_path_factory.mktemp("valkey")) as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        redis_servers[server.port] = url
        yield url
        del redis_servers[server.port]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """A real S3 server, with the buckets `photos` and `results`."""
    with servers.s3(tmp_path_factory.mktemp("s3"), ("photos", "results")) as server:
        yield server


@pytest.fixture
def s3_settings(s3_server: servers.S3Server) -> dict[str, Any]:
    """The settings for the real S3 server."""
    return {
        "s3_endpoint_url": s3_server.url,
        "s3_access_key_id": s3_server.access_key_id,
        "s3_secret_access_key": SecretStr(s3_server.secret_access_key),
    }


@pytest.fixture
def settings(valkey: str, request: pytest.FixtureRequest) -> Settings:
    """Settings for the real Valkey, with a key prefix for each test."""
    return Settings(broker_url=valkey, key_prefix=key_prefix(request))


@pytest.fixture
def tiny() -> TinyNetwork:
    """A network with known heatmaps."""
    return TinyNetwork()


@pytest.fixture
def job() -> Job:
    return Job.parse({"image": "s3://in/pier.jpg", "network": "efficientnet_lite0", "target": {"top_n": 2}})


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run functions without tracing them, which takes most of the time of a small network.

    For tests of what is computed. That it is the same when traced, and when the classes of an image go back
    together, is tested in test_every_method and test_oracles.
    """
    import tensorflow as tf

    def one_by_one(function: Callable[[Any], Any], values: Any) -> Any:
        return tf.stack([function(value) for value in tf.unstack(values)])

    monkeypatch.setattr(tf, "vectorized_map", one_by_one)  # which traces, even so
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def save_model() -> Callable[..., str]:
    """Save a small network of three classes, with its convolution in a nested model; return its checksum."""

    def save(path: Path, *, seed: int = 1, rescales: bool = False) -> str:
        from gradcam_worker.gradcam.backend import keras

        layers = keras.layers
        keras.utils.set_random_seed(seed)
        convolution = layers.Conv2D(4, 3, name="last", activation="relu")
        backbone = [convolution] if not rescales else [layers.Rescaling(1 / 255), convolution]
        model = keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                keras.Sequential([keras.Input((32, 32, 3)), *backbone], name="backbone"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(3, activation="softmax"),
            ]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # between Keras and NumPy
            model.save(path)
        return file_sha256(path)

    return save


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens, outside the range from which the system chooses ports."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as free,  # noqa: S311  # no secret
        ):
            return int(free.getsockname()[1])


@dataclass
class Answer:
    """The answer of the HTTP server for one path."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] = lambda: None  # called before the answer is sent


@dataclass
class HttpServer:
    """A real HTTP server with prepared answers, which records its requests."""

    host: str
    answers: dict[str, Answer] = field(default_factory=dict)
    received: list[tuple[str, bytes]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # of the received requests

    def url(self, path: str, answer: Answer) -> str:
        """Prepare an answer; return its URL."""
        self.answers[path] = answer
        return f"http://{self.host}{path}"


@pytest.fixture
def answer() -> type[Answer]:
    """The class of prepared answers."""
    return Answer


@pytest.fixture
def http_server() -> Iterator[HttpServer]:
    """A server for one test."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def public_server() -> Iterator[HttpServer]:
    """A server for all tests, so that workers that several tests use can be configured with its address."""
    with serving() as server:
        yield server


@contextlib.contextmanager
def serving() -> Iterator[HttpServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            server.received.append((self.path, body))
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = server.answers.get(self.path, Answer(404))
            answer.before()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                self.send_answer(answer)

        def send_answer(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names are the library's

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = HttpServer(f"127.0.0.1:{listener.server_port}")
        threading.Thread(target=listener.serve_forever, args=[0.05], daemon=True).start()
        yield server
        listener.shutdown()


@dataclass
class Encrypted:
    """A TLS proxy for a server without TLS, with a certificate for `localhost`."""

    port: int
    ca: Path  # the certificate of its authority


@pytest.fixture(scope="session")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Encrypted]]:
    """Start a TLS proxy for a port of this machine, until the end of the session."""
    ca = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(ca))
    with contextlib.ExitStack() as stack:

        def start(target: int) -> Encrypted:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            threading.Thread(target=_encrypt, args=[listener, context, target], daemon=True).start()
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return Encrypted(listener.getsockname()[1], ca)

        yield start


def _encrypt(listener: socket.socket, context: ssl.SSLContext, target: int) -> None:
    with contextlib.suppress(OSError):  # which the shutdown of the listener raises
        while True:
            caller, _ = listener.accept()
            threading.Thread(target=_forward, args=[caller, context, target], daemon=True).start()


def _forward(caller: socket.socket, context: ssl.SSLContext, target: int) -> None:
    """Forward data in both directions, until either side closes."""
    with (
        caller,
        contextlib.suppress(OSError),
        context.wrap_socket(caller, server_side=True) as inside,
        socket.create_connection(("127.0.0.1", target)) as services,
    ):
        back = threading.Thread(target=_copy, args=[services, inside], daemon=True)
        back.start()
        _copy(inside, services)
        back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
