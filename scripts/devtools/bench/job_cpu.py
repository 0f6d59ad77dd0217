"""CPU time of a job and of a shard's row, in a worker whose network costs nothing, against a floor: what its
unavoidable parts take when they run alone on one thread, in the same run. A job: a JPEG of 500x375 is decoded
and fitted, three overlays are encoded, five objects are hashed and put. A row: get, decode, fit. Then the
same in an engine process and a job process, on one core and on all.

    job_cpu.py PASSES

runs the worker. Each named part of a job is timed by its thread's own clock, without the parts within it.
What no part covers is counted by the thread that did it.
"""

import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import obstore.store

from devtools.bench import backfill_command, simulated_network, testbed
from devtools.bench.report import Figures, Requirement, at_most, table
from devtools.bench.testbed import Testbed
from devtools.bench.timing import clock
from devtools.processes import PROC, cpu_seconds, repeating
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.imaging.overlay import ENCODER_OPTIONS, OverlayBase
from gradcam_worker.runtime.devices import FEW_THREADS

# isort: split
# Only now: the package of the worker tells OpenCV how large an image may be before it is loaded.
import cv2
import simplejpeg

os.environ.update(FEW_THREADS)  # in this process, too, before obstore starts its threads

TITLE = "CPU of a job"
PACKAGES = ("celery", "kombu", "redis", "obstore", "opencv-python-headless", "simplejpeg", "pydantic")
REQUIRED_TIMES_FLOOR = {"job": 2.0, "row": 1.4}
FLOORS = {"job": ("decode", "fit", "encode", "put", "hash"), "row": ("get", "decode", "fit")}
PHOTOS, TURNS, NETWORK, SIDE = 40, 3, "no_time", 224
ACROSS = "engine and a job process on one core"
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    ACROSS: {"job_processes": 1, "one_core": True},
    "engine and a job process on all cores": {"job_processes": 1, "one_core": False},
}
COUNTS, QUICK_COUNTS = {"job": 400, "row": 1024}, {"job": 60, "row": 128}  # in a turn
REPEATS, QUICK_REPEATS = 100, 20  # of the floor, in a turn
POLL_INTERVAL_S, PATIENCE_S = 0.1, 300

PARTS = {  # name -> the functions that are it, as `module:name`, where they are called
    "receive": "broker.transport:Channel._brpop_start broker.transport:Channel._brpop_read",
    "check the message": "broker.envelope:parse_message",
    "note it as unacknowledged": "broker.transport:QoS.append",
    "acknowledge": "broker.transport:Message.ack_log_error",
    "Celery around a job": "broker.consumer:apply_target",
    "handler and pipeline": "execution.handler:JobHandler.handle",
    "parse the job": "schemas.job:Job.model_validate",
    "documents": "ledger.ledger:Ledger.claim_fresh ledger.ledger:Ledger.finish ledger.ledger:Ledger.advance",
    "scripts of the ledger": "redis_server.client:RedisClients._call",
    "log": "text.log_events:EventLogger._log",
    "fetch": "images.prepare:_fetch",
    "fetch: read": "storage.s3:_try_both",
    "decode: header": "images.prepare:read_structure",
    "decode": "images.prepare:decode",
    "fit": "images.prepare:DecodedImage.fit",
    "explain: hand-over": "inference.batcher:Batcher._compute",
    "explain: ranks, heatmaps": "inference.model_cache:extract_explanation",
    "where the heat lies": "execution.pipeline:locate execution.shard_rows:locate",
    "boxes": "gradcam.imaging.region:hot_box execution.shard_rows:hot_box",
    "draw": "gradcam.imaging.overlay:OverlayBase.__init__ gradcam.imaging.overlay:OverlayBase.draw",
    "encode": "gradcam.imaging.overlay:encode",
    "arrays": "artifacts.render:_encode_arrays",
    "hash": "artifacts.artifacts:describe",
    "manifest": "artifacts.artifacts:build_manifest",
    "upload": "storage.stores:S3Upload.add storage.stores:S3Upload.finish",
    "put": "storage.stores:S3Store._put",
    "dataset file": "artifacts.dataset:to_bytes",
}
REST = {  # how the name of a thread begins -> what it does besides the parts
    "MainThread": "the rest of the event loop",
    "ThreadPoolExecutor": "the rest of job threads",
    "upload": "the rest of upload threads",
    "read": "the rest of read threads",
    "tokio": "obstore's own threads",
    "": "the batcher and others",
}


class Parts:
    """Times functions by the clock of the thread that calls them."""

    def __init__(self) -> None:
        """Nothing is timed yet."""
        self._local = threading.local()
        self._threads: list[tuple[int, Counter[str], Counter[str]]] = []  # id, seconds and calls by part

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed as a part."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            local, begun = self._local, time.thread_time()
            if not hasattr(local, "inner"):
                local.inner, local.seconds, local.calls = 0.0, Counter[str](), Counter[str]()
                self._threads.append((threading.get_native_id(), local.seconds, local.calls))
            outer, local.inner = local.inner, 0.0
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - begun
                local.seconds[name] += took - local.inner
                local.calls[name] += 1
                local.inner = outer + took

        return call

    def install(self) -> None:
        """Replace the functions of all parts."""
        for name, places in PARTS.items():
            for place in places.split():
                module, _, path = place.partition(":")
                *owners, attribute = path.split(".")
                holder: Any = importlib.import_module(f"gradcam_worker.{module}")
                for owner in owners:
                    holder = getattr(holder, owner)
                setattr(holder, attribute, self.timed(name, getattr(holder, attribute)))

    def read(self) -> tuple[Counter[str], Counter[str]]:
        """Return seconds and calls until now, by part; the seconds of each group of threads besides."""
        seconds: Any = Counter[str]()
        calls, covered = Counter[str](), dict[int, float]()
        for thread, own_seconds, own_calls in [*self._threads]:
            seconds.update(dict(own_seconds))
            calls.update(dict(own_calls))
            covered[thread] = sum(dict(own_seconds).values())
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        for task in (PROC / "self" / "task").iterdir():
            used_s = int((task / "schedstat").read_text("ascii").split()[0]) / 1e9
            name = names.get(int(task.name)) or (task / "comm").read_text("ascii")
            group = next(what for start, what in REST.items() if name.startswith(start))
            seconds[group] += used_s - covered.get(int(task.name), 0.0)
        return seconds, calls


def work(file: str) -> int:
    """Run a worker. When somebody makes a file `asked` beside `file`, write `answered`: what parts took."""
    parts, asked = Parts(), Path(file).with_name("asked")
    parts.install()

    def answer() -> None:
        if asked.exists():
            asked.with_name("answered").write_text(json.dumps(parts.read()), encoding="ascii")
            asked.unlink()

    with repeating(answer, POLL_INTERVAL_S):
        return simulated_network.work(file)


def floor_parts(bed: Testbed, photo: bytes) -> dict[str, Callable[[], object]]:
    """The unavoidable parts, each as a function. `photo` is the first image in the store."""
    pixels, network = simplejpeg.decode_jpeg(photo), simulated_network.SimulatedNetwork(NETWORK)
    fitted = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    (explanation,) = explain_pixels(network, fitted[np.newaxis], [network.labels.select(top_n=3)])
    base, quality = OverlayBase(pixels.copy(), bgr=True), ENCODER_OPTIONS["jpeg"]
    drawn = [base.draw(heatmap) for heatmap in explanation.shown]
    encoded = [cv2.imencode(".jpg", one, quality)[1].tobytes() for one in drawn]
    objects = [*encoded, bytes(explanation.heatmaps.nbytes + 1000), bytes(4000)]
    settings, key = bed.settings, bed.images[0].rpartition("/")[2]
    photos, results = (
        obstore.store.S3Store(
            bucket,
            endpoint=settings.s3_endpoint_url,
            access_key_id=settings.s3_access_key_id,
            secret_access_key=settings.s3_secret_access_key.get_secret_value(),
            region=settings.region,
            client_options={"allow_http": True},
        )
        for bucket in ("photos", "results")
    )
    return {
        "get": lambda: bytes(photos.get(key).bytes()),
        "decode": lambda: simplejpeg.decode_jpeg(photo, fastdct=False, fastupsample=False),
        "fit": lambda: cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA),
        "encode": lambda: [cv2.imencode(".jpg", one, quality)[1].tobytes() for one in drawn],
        "put": lambda: [results.put(f"floor/{key}", one, use_multipart=False) for one in objects],
        "hash": lambda: [hashlib.sha256(one).hexdigest() for one in (photo, *objects)],
    }


def run_jobs(bed: Testbed, count: int) -> None:
    """Run jobs, top 3 with default artifacts."""
    bed.done(bed.client.submit_many(bed.jobs(NETWORK, count)))


def run_rows(bed: Testbed, count: int) -> None:
    """Run a backfill in shards as large as by default."""
    with tempfile.TemporaryDirectory() as place:
        uris = itertools.islice(itertools.cycle(bed.images), count)
        source = backfill_command.write_input(Path(place) / "input.csv", uris)
        output = f"{bed.settings.output}{place}"
        words, variables = (
            backfill_command.command(source, output, NETWORK),
            bed.settings.environment_for_child(),
        )
        subprocess.run(words, env=variables, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE_S)


RUNS: dict[str, Callable[[Testbed, int], None]] = {"job": run_jobs, "row": run_rows}


def used(bed: Testbed) -> tuple[Counter[str], Counter[str]]:
    """What the worker has used until now: seconds and calls by part; `total` is of all its processes."""
    asked = bed.passes.with_name("asked")
    asked.touch()
    while asked.exists():
        bed.check()
        time.sleep(POLL_INTERVAL_S)
    seconds, calls = json.loads(asked.with_name("answered").read_text(encoding="ascii"))
    return Counter({**seconds, "total": cpu_seconds(bed.processes["worker"])}), Counter(calls)


def measure(*, quick: bool) -> dict[str, Any]:
    """Floor, jobs and rows take turns."""
    photos, counts = testbed.photographs(PHOTOS), QUICK_COUNTS if quick else COUNTS
    turns, repeats = (1, QUICK_REPEATS) if quick else (TURNS, REPEATS)
    parts = {kind: (Counter[str](), Counter[str]()) for kind in FLOORS}
    threads, floors = cv2.getNumThreads(), list[dict[str, float]]()
    cv2.setNumThreads(1)  # as in the worker
    try:
        with testbed.running((NETWORK,), photos, program=__file__) as bed:
            alone = floor_parts(bed, photos[0])
            run_jobs(bed, counts["job"])  # warms up
            for _ in range(turns):
                floors.append({name: _median_ms(run, repeats) for name, run in alone.items()})
                for kind, run in RUNS.items():
                    before = used(bed)
                    run(bed, counts[kind])
                    for total, then, now in zip(parts[kind], before, used(bed), strict=True):
                        total.update({name: (now[name] - then[name]) / counts[kind] / turns for name in now})
            device = bed.device
        across = {} if quick else _across(photos, counts, turns)
    finally:
        cv2.setNumThreads(threads)
    floor_ms = {name: median(each[name] for each in floors) for name in floors[0]}
    cpu_ms = {kind: 1e3 * seconds["total"] for kind, (seconds, _) in parts.items()}
    return {
        "device": device,
        "floor_ms": floor_ms,
        "parts": {
            kind: {name: (1e3 * seconds[name], calls[name]) for name in seconds}
            for kind, (seconds, calls) in parts.items()
        },
        "across_ms": across,
        **{f"cpu_ms_per_{kind}": ms for kind, ms in cpu_ms.items()},
        **{
            f"times_floor_{kind}{where}": ms[kind] / sum(floor_ms[name] for name in names)
            for where, ms in (("", cpu_ms), ("_across", across.get(ACROSS, {})))
            for kind, names in FLOORS.items()
            if kind in ms
        },
    }


def _across(photos: Sequence[bytes], counts: dict[str, int], turns: int) -> dict[str, dict[str, float]]:
    """What an engine process and a job process take together for a job and for a row, in milliseconds."""
    taken: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in RUNS} for name in ARRANGEMENTS}
    with ExitStack() as stack:
        beds = {
            name: stack.enter_context(testbed.running((NETWORK,), photos, **changes))
            for name, changes in ARRANGEMENTS.items()
        }
        for bed in beds.values():
            run_jobs(bed, counts["job"])  # warms up
        for _ in range(turns):
            for (name, bed), (kind, run) in itertools.product(beds.items(), RUNS.items()):
                taken[name][kind].append(_cpu_ms(bed, run, counts[kind]))
    return {name: {kind: median(each) for kind, each in of.items()} for name, of in taken.items()}


def _cpu_ms(bed: Testbed, run: Callable[[Testbed, int], None], count: int) -> float:
    """What the processes of the worker take for one of so many, in milliseconds."""
    before = cpu_seconds(bed.processes["worker"])
    run(bed, count)
    return 1e3 * (cpu_seconds(bed.processes["worker"]) - before) / count


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    run()
    return 1e3 * median(clock(run)[1] for _ in range(repeats))


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Times the floor."""
    for kind, most in REQUIRED_TIMES_FLOOR.items():
        for where, words in ("", ""), ("_across", f", {ACROSS}"):
            if (times := figures.get(f"times_floor_{kind}{where}")) is not None:
                yield at_most(f"CPU of a {kind}, by its floor{words}", most, times, " times")


def blocks(figures: Figures) -> Iterator[str]:
    """The floor, and where the time goes."""
    for kind, names in FLOORS.items():
        parts = ", ".join(f"{name} {figures['floor_ms'][name]:.2f}" for name in names)
        yield f"Floor of a {kind}, CPU ms: {parts}; together {sum(map(figures['floor_ms'].get, names)):.2f}."
    for name, ms in figures["across_ms"].items():
        yield f"An {name}: {ms['job']:.2f} CPU ms a job, {ms['row']:.2f} a row."
    yield "What a worker of one process takes, CPU ms, and how often:"
    rows = []
    for name in ("total", *PARTS, *REST.values()):
        job, row = (figures["parts"][kind].get(name, (0.0, 0.0)) for kind in FLOORS)
        cells = (f"{job[0]:.2f}", f"{job[1]:.1f}", f"{row[0]:.2f}", f"{row[1]:.1f}")
        rows.append((name, *("" if not float(cell) else cell for cell in cells)))
    yield table(("", "a job", "calls", "a row", "calls"), rows)


if __name__ == "__main__":
    sys.exit(work(sys.argv[1]))
