"""Mixed jobs, good and hostile, for a while: what a worker process uses must not grow; nothing may be left.

Good ones, bad addresses, bad images, unknown classes, cancelled and expired ones, duplicates with idempotency
keys, jobs of other programs that the ledger does not know, and malformed messages.
"""

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.faults.cluster import START_S, Cluster, Worker, running_cluster, wait_for
from devtools.faults.observer import JobObserver, delivered, end_of
from devtools.faults.verdict import Verdict
from devtools.processes import repeating, resident_bytes
from gradcam_worker.broker import publisher
from gradcam_worker.errors import IdempotencyConflict
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Job

READ_INTERVAL_S = 0.5
WARM_UP = 0.3  # share of the readings that do not count, until pools and caches are full
AHEAD = 40  # jobs that wait or run at a time
FLAT = 0.05  # by so much resident memory may grow after that
LONG_S = 120.0  # a shorter run is still warming up at its end, and is held to less
ROUGHLY_FLAT = 0.3
MORE = 4  # threads and files that may come and go
# A short run on a busy machine may still be warming up at its end: then it goes on. A leak grows in each.
ROUNDS = 4
RETENTION_S = 60.0  # the least there is
DRAINS_S = 120.0
LISTS = "listed:"  # these live a week longer, in which a job may wait: see `include/listing.lua`
OF_JOBS = ("job:", "idempotency:")  # keys that are forgotten with their job
# Keys of the ledger and of kombu that are there once: see `gradcam_worker.ledger.redis.scripts`.
OF_LEDGER = ("claimed", "ended:", "workers", "reaper", "dead")
OF_KOMBU = ("_kombu.binding", "unacked_mutex", "unreadable")
BAD_ADDRESSES = {
    "s3://photos/missing.jpg": "image_not_found",
    "s3://nowhere/missing.jpg": "image_not_found",
    "http://169.254.169.254/latest/meta-data": "uri_not_allowed",
    "file:///etc/passwd": "uri_not_allowed",
}
BAD_IMAGES = {
    "cut.jpg": ("image_decode_failed", "succeeded"),  # what is there of it may do
    "text.jpg": ("unsupported_media_type",),
    "huge.gif": ("image_pixels_exceeded", "image_decode_failed"),
}
BAD_FIELDS: dict[str, dict[str, Any]] = {
    "unknown_class": {"target": {"classes": ["no such thing"]}},
    "unknown_network": {"network": "no_such_network"},
    "unknown_layer": {"method": {"layer": "no_such_layer"}},
    "output_not_allowed": {"output": "s3://elsewhere/x"},
    "checksum_mismatch": {"image": {"uri": "s3://photos/1.jpg", "sha256": "0" * 64}},
}


@dataclass
class Usage:
    """Memory, threads and open files of one process, read repeatedly: do they grow?"""

    pid: int
    readings: list[tuple[float, ...]] = field(default_factory=list)  # seconds, bytes, threads, open files

    def read(self) -> None:
        """Add a reading."""
        process = Path("/proc", str(self.pid))
        threads, files = (len(list((process / name).iterdir())) for name in ("task", "fd"))  # sockets, too
        self.readings.append((time.monotonic(), resident_bytes([self.pid]), threads, files))

    def warm(self) -> NDArray[np.float64]:
        """Return the readings after the warm-up, (4, readings)."""
        return np.array(self.readings[int(len(self.readings) * WARM_UP) :], np.float64).T

    def growth(self) -> float:
        """Return the growth of resident memory as a share of it: the median of all slopes (Theil-Sen)."""
        seconds, resident = self.warm()[:2]
        first, second = np.triu_indices(len(seconds), 1)
        slopes = (resident[second] - resident[first]) / (seconds[second] - seconds[first])
        return float(np.median(slopes) * (seconds[-1] - seconds[0]) / np.median(resident))

    def rises(self) -> dict[str, float]:
        """Return by how much the last third of the warm threads and files is above the first."""
        counts = self.warm()[2:]
        third = max(counts.shape[1] // 3, 1)
        more = np.median(counts[:, -third:], axis=1) - np.median(counts[:, :third], axis=1)
        return dict(zip(("threads", "files"), more.tolist(), strict=True))

    def grown(self, seconds: float) -> list[str]:
        """What grew in this time, and by how much."""
        growth, most = self.growth(), FLAT if seconds >= LONG_S else ROUGHLY_FLAT
        rises = {name: more for name, more in self.rises().items() if more > MORE}
        sentences = [
            f"{more:g} {name} more are open at the end than after the warm-up."
            for name, more in rises.items()
        ]
        if growth > most:
            sentences.append(f"Resident memory grew by {growth:.1%} after the warm-up; {most:.0%} is flat.")
        return sentences


@dataclass
class Mix:
    """Makes jobs of all kinds, submits them, and knows how each may end."""

    cluster: Cluster
    seed: int
    made: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    ends: dict[str, tuple[str, ...]] = field(default_factory=dict)  # job id -> how it may end
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Store the bad images, and find the kinds of jobs."""
        self._random = random.Random(self.seed)  # noqa: S311  # repeatable, not secret
        photos = self.cluster.folder / "buckets" / "photos"
        good = (photos / "0.jpg").read_bytes()
        (photos / "cut.jpg").write_bytes(good[: len(good) // 2])
        (photos / "text.jpg").write_bytes(b"This is no image. " * 99)
        (photos / "huge.gif").write_bytes(b"GIF89a" + (30_000).to_bytes(2, "little") * 2 + bytes(38))
        names = [name for name in dir(self) if name.startswith("_do_")]
        self._kinds: dict[str, Callable[[int], None]] = {name[4:]: getattr(self, name) for name in names}

    @property
    def complete(self) -> bool:
        """Whether every kind has had its turn."""
        return len(self.kinds) == len(self._kinds)

    def one(self) -> None:
        """Make another one: every second a good one, from the first on, the others left to chance."""
        kind = "good" if self.made % 2 == 0 else self._random.choice(sorted(self._kinds))
        self._kinds[kind](self.made)
        self.kinds[kind] += 1
        self.made += 1

    def _submit(self, number: int, *ends: str, **changes: Any) -> Job:
        job = self.cluster.job(number, **{"max_attempts": 3, "timeout_s": 60, **changes})
        self.ends[job.id] = ends
        self.cluster.submit(job)
        return job

    def _do_good(self, number: int) -> None:
        self._submit(number, "succeeded", webhooks=self.cluster.hook() if number % 5 == 0 else [])

    def _do_bad_address(self, number: int) -> None:
        uri = self._random.choice(sorted(BAD_ADDRESSES))
        self._submit(number, BAD_ADDRESSES[uri], image=uri)

    def _do_bad_image(self, number: int) -> None:
        name = self._random.choice(sorted(BAD_IMAGES))
        self._submit(number, *BAD_IMAGES[name], image=f"s3://photos/{name}")

    def _do_bad_field(self, number: int) -> None:
        code = self._random.choice(sorted(BAD_FIELDS))
        self._submit(number, code, **BAD_FIELDS[code])

    def _do_cancelled(self, number: int) -> None:
        self.cluster.client.cancel(self._submit(number, "canceled", "succeeded").id)

    def _do_expired(self, number: int) -> None:
        expires_at = utc_now() + timedelta(seconds=self._random.choice([0.001, 0.3]))
        self._submit(number, "expired", "succeeded", expires_at=expires_at)

    def _do_duplicate(self, number: int) -> None:
        job = self._submit(number, "succeeded", idempotency_key=f"key {number}")
        same = job.model_copy(update={"id": self.cluster.job(-number).id})
        if (first := self.cluster.client.submit(same)) != job.id:
            self.broken.append(f"The idempotency key of {job.id} led to {first}.")
        with contextlib.suppress(IdempotencyConflict):
            self.cluster.client.submit(same.model_copy(update={"metadata": {"other": "yes"}}))
            self.broken.append(f"Another job was accepted under the idempotency key of {job.id}.")

    def _do_unknown_job(self, number: int) -> None:
        """By name, from a Celery client that knows nothing of the ledger."""
        self._send(self.cluster.job(number), {}, "succeeded")

    def _do_no_job(self, number: int) -> None:
        changes = {self._random.choice(["image", "target", "extra"]): [1, {}]}
        self._send(self.cluster.job(number), changes, "invalid_job")

    def _send(self, job: Job, changes: dict[str, Any], *ends: str) -> None:
        self.cluster.send(job.id, {**job.model_dump(mode="json"), **changes})
        self.ends[job.id] = ends
        self.cluster.accepted[job.id] = time.monotonic()

    def _do_no_message(self, number: int) -> None:
        """Straight into the list that is the queue."""
        envelope = {"body": "bm8=", "headers": {"id": number, "task": "x"}, "properties": {}}
        properties = {"delivery_tag": number, "delivery_info": []}
        envelopes = [envelope, {**envelope, "headers": None}, {**envelope, "properties": properties}]
        texts = [b"{}", b"[]", b"null", b'"text"', b"[" * 5000, self._random.randbytes(60)]
        texts += [json.dumps(broken).encode() for broken in envelopes]
        with self.cluster.ledger as server:
            queue = f"{self.cluster.settings.key_prefix}{publisher.INTERACTIVE}"
            server.lpush(queue, self._random.choice(texts))


def attack(count: int, seed: int) -> Verdict:
    """Run for `count` seconds."""
    retention = {"retention_s": RETENTION_S, "idempotency_retention_s": RETENTION_S}
    with (
        running_cluster("soak", seed, **retention) as cluster,
        JobObserver(cluster, forgotten=True) as observer,
    ):
        mix, worker = Mix(cluster, seed), cluster.work()
        mix.one()
        wait_for(lambda: observer.finals, START_S, "the first job ends")
        pid = worker.process or 0  # it is there: a good job ends nowhere else
        for _ in range(1 if count >= LONG_S else ROUNDS):
            usage = _feed(observer, mix, Usage(pid), count)
            if worker.process != pid or not usage.grown(count):
                break
        verdict = _verdict(cluster, observer, mix)
        _check_usage(usage, count, verdict, worker)
        wait_for(lambda: not _keys(cluster, "events:"), DRAINS_S, "all webhooks are delivered")
        _check_remaining_keys(cluster, verdict)
        if count >= LONG_S:
            time.sleep(RETENTION_S + 5)
            kept = _keys(cluster, *OF_JOBS, "events:")
            verdict.figures["keys_after_retention"] = len(kept)
            verdict.forbid(kept, "keys outlast their retention")
        cluster.stop_workers()
        left = [path.name for path in (cluster.folder / "tmp").rglob("*") if path.is_file()]
        verdict.figures["temporary_files"] = len(left)
        verdict.forbid(left, "temporary files are left")
    return verdict


def _feed(observer: JobObserver, mix: Mix, usage: Usage, seconds: float) -> Usage:
    """Jobs for so long, and until each kind has had its turn; all of them end. What the worker used."""
    end = time.monotonic() + seconds
    with repeating(usage.read, READ_INTERVAL_S):
        while time.monotonic() < end or not mix.complete:
            if observer.unfinished() < AHEAD:
                mix.one()
            else:
                time.sleep(0.005)
        observer.drain(DRAINS_S)
    return usage


def _verdict(cluster: Cluster, observer: JobObserver, mix: Mix) -> Verdict:
    hostile = mix.made - mix.kinds["good"]
    verdict = observer.verdict(faults=hostile, expected=lambda job_id: mix.ends[job_id])
    verdict.broken += mix.broken
    verdict.doubled += sum(any(end != ends[0] for end in ends) for ends in delivered(cluster).values())
    ends = Counter(end_of(document) for document in observer.documents().values() if document)
    verdict.figures |= {"kinds": dict(sorted(mix.kinds.items())), "ends": dict(sorted(ends.items()))}
    return verdict


def _check_usage(usage: Usage, seconds: float, verdict: Verdict, worker: Worker) -> None:
    if worker.process != usage.pid:
        lines = [*worker.restarts[-4:], *worker.log_lines[-1:]]
        verdict.broken.append(f"Process {usage.pid} has ended, {worker.process} is in its place: {lines}")
        return
    verdict.broken += usage.grown(seconds)
    _, resident, threads, files = usage.warm()[:, [0, -1]].tolist()
    verdict.figures |= {
        "resident_mb": [round(size / 1e6, 1) for size in resident],
        "resident_growth": round(usage.growth(), 4),
        "threads": threads,
        "files": files,
        "readings": len(usage.readings),
    }


def _keys(cluster: Cluster, *beginnings: str) -> list[str]:
    """Keys of the ledger that begin so, or all of them, without their prefix."""
    prefix = cluster.settings.key_prefix
    with cluster.ledger as server:
        keys = sorted(key.removeprefix(prefix) for key in server.scan_iter(count=1000))
    return [key for key in keys if key.startswith(beginnings or "")]


def _check_remaining_keys(cluster: Cluster, verdict: Verdict) -> None:
    """Every key is a job's, which will be forgotten, or one of the few that are always there."""
    keys, prefix = _keys(cluster), cluster.settings.key_prefix
    patterns = Counter(key.partition(":")[0] if ":" in key else key for key in keys)
    verdict.figures["keys"] = dict(sorted(patterns.items()))
    known = (LISTS, *OF_JOBS, *OF_LEDGER, *OF_KOMBU)
    odd = [key for key in keys if not key.startswith(known) and "pidbox" not in key]
    verdict.forbid(odd, "keys are left when nothing is under way")
    with cluster.ledger as server:
        mortal = [prefix + key for key in keys if key.startswith((LISTS, *OF_JOBS))]
        immortal = [key for key in mortal if server.pttl(key) < 0 and server.exists(key)]
    verdict.forbid(immortal, "keys of final jobs stay for ever")
