"""A testbed: a real Valkey, a real S3 server and one real worker."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from subprocess import Popen
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from devtools import processes
from devtools.bench import simulated_network
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import WorkerLost
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.gradcam.imaging.resize import Pixels, fit
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.operations import servers as embedded
from gradcam_worker.runtime import parent_watch, service_factory
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3

START_S = 240  # TensorFlow is loaded and each network is run for the first time
STALLED_S = 120  # without a job that ends, something hangs
READ_INTERVAL_S = 0.2  # of what the processes use
POLL_INTERVAL_S = 0.05


@dataclass
class Testbed:
    """Servers and a worker that run, and what is needed to give them work."""

    settings: Settings
    client: GradcamClient
    ledger: Ledger
    s3: S3
    worker: Popen[bytes]
    log: Path
    passes: Path
    images: list[str]  # URIs
    processes: dict[str, list[int]]  # their ids: worker, s3, valkey, and this program as `bench`
    device: str = ""  # that the worker computes on

    def jobs(self, network: str, count: int, **fields: Any) -> list[Job]:
        """Bulk jobs, one image after the other: top 3 classes, default artifacts, unless `fields` differ."""
        fields = {"network": network, "target": {"top_n": 3}, "priority": "bulk", **fields}
        return [Job.parse({"image": uri, **fields}) for uri in islice(cycle(self.images), count)]

    def drain(self, patience_s: float = STALLED_S) -> None:
        """Return when no job is left. Raises WorkerLost, also where none has ended for so long."""
        left, since = sum(self.ledger.count_jobs()), time.monotonic()
        while left:
            time.sleep(POLL_INTERVAL_S)
            now = sum(self.ledger.count_jobs())
            if now != left:
                left, since = now, time.monotonic()
            self.check(time.monotonic() - since < patience_s)

    def check(self, alive: bool = True) -> None:
        """Raise WorkerLost where the worker has ended, or where something else says that it hangs."""
        if not alive or self.worker.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            message = f"The worker ended or hangs. The end of its log:\n{tail}"
            raise WorkerLost(message)

    def done(self, ids: Sequence[str], patience_s: float = STALLED_S) -> list[StatusDocument]:
        """Wait for jobs, which all have to succeed; the first to be completed first. Raises WorkerLost."""
        self.drain(patience_s)
        documents = list(self.client.statuses(ids).values())
        failed = [
            document.error or document.status for document in documents if document.status != "succeeded"
        ]
        if failed or len(documents) != len(ids):
            message = f"Of {len(ids)} jobs {len(documents)} are known, {len(failed)} failed: {failed[:1]}"
            raise WorkerLost(message)
        return sorted(documents, key=completed)

    def store(self, name: str, data: bytes) -> str:
        """Put an image into the bucket of photos; return its URI."""
        self.s3.client.put_object(Bucket="photos", Key=name, Body=data)
        return f"s3://photos/{name}"


def completed(document: StatusDocument) -> float:
    """When a final job ended, in seconds since the epoch."""
    return document.completed_at.timestamp() if document.completed_at else 0.0


def settings_of(
    folder: Path, valkey: embedded.Server, s3_server: embedded.S3Server, **changes: Any
) -> Settings:
    """Settings for these servers and the stand-ins, whose description is written into `folder`.

    One process does everything, unless `changes` say otherwise.
    """
    registry = folder / "networks.toml"
    registry.write_text(simulated_network.REGISTRY, encoding="utf-8")
    return Settings(
        broker_url=f"redis://127.0.0.1:{valkey.port}/0",
        output="s3://results/bench",
        s3_endpoint_url=s3_server.url,
        s3_access_key_id=s3_server.access_key_id,
        s3_secret_access_key=SecretStr(s3_server.secret_access_key),
        networks=registry,
        **{"job_processes": 0, **changes},
    )


@contextmanager
def running(
    networks: tuple[str, ...],
    photos: Sequence[bytes],
    *,
    program: str = simulated_network.__file__,
    **changes: Any,
) -> Iterator[Testbed]:
    """Start the servers and a worker with these networks loaded and warm; stop all of it in the end.

    `photos` are stored as images; `program` is the worker's; `changes` are settings. Raises WorkerLost,
    InvalidSettings.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-bench-")))
        valkey = stack.enter_context(embedded.valkey(folder))
        s3_server = stack.enter_context(embedded.s3(folder, ("photos", "results")))
        changes = {"preload": networks, "shutdown_timeout_s": simulated_network.GRACE_S, **changes}
        settings = settings_of(folder, valkey, s3_server, **changes)
        log, passes = folder / "worker.log", folder / "passes"
        worker = simulated_network.start_worker(settings, log, str(passes), program=program)
        stack.callback(parent_watch.stop, worker)
        client, ledger = GradcamClient(settings=settings), service_factory.build_ledger(settings)
        bed = Testbed(settings, client, ledger, S3(settings), worker, log, passes, [], {})
        with ThreadPoolExecutor(settings.threads) as pool:
            names = [f"{number:05}.jpg" for number in range(len(photos))]
            bed.images.extend(pool.map(bed.store, names, photos))
        first_jobs = [job for network in networks for job in bed.jobs(network, 1)]
        first, *_ = bed.done(client.submit_many(first_jobs), START_S)
        bed.device = first.worker.device if first.worker else ""
        started = {"worker": worker, "s3": s3_server.process, "valkey": valkey.process}
        bed.processes.update({name: processes.family(process.pid) for name, process in started.items()})
        bed.processes["bench"] = [os.getpid()]
        yield bed


def photographs(count: int, size: tuple[int, int] = (375, 500)) -> list[bytes]:
    """JPEGs of `size` (height, width), no two the same: the shipped photos, each cut out elsewhere."""
    shipped = [decode(path.read_bytes()).pixels for path in sorted((DATA / "photos").glob("*.jpg"))]
    draw = np.random.default_rng(simulated_network.SEED)
    return [encode(_cut(photo, size, draw)) for photo in islice(cycle(shipped), count)]


def _cut(photo: Pixels, size: tuple[int, int], draw: np.random.Generator) -> Pixels:
    """A part of a photo (height, width, 3), at least two thirds of either side, as large as asked for."""
    height, width, _ = photo.shape
    rows, columns = (int(side * draw.uniform(2 / 3, 1)) for side in (height, width))
    top, left = draw.integers(0, height - rows + 1), draw.integers(0, width - columns + 1)
    part = photo[top : top + rows, left : left + columns]
    large = cv2.resize(part, size[::-1], interpolation=cv2.INTER_CUBIC)
    return fit(np.asarray(large, np.uint8), size)


def jobs_per_second(times: NDArray[np.float64], begin: float, end: float) -> float:
    """Return the slope of completions over time between two times; batches end all at once."""
    inside = times[(times >= begin) & (times <= end)]
    return float(np.polyfit(inside - begin, np.arange(len(inside)), 1)[0])
