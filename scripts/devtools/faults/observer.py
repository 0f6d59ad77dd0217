"""Reads from outside what becomes of jobs while they are attacked: the ledger's keys, the bucket's files.

Nothing here asks the worker's own code how it went: documents are read from Redis as they lie there,
artifacts from the disk of the S3 server, and compared by checksum.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import redis

from devtools.faults import webhook_receiver
from devtools.faults.cluster import Cluster
from devtools.faults.verdict import Verdict
from gradcam_worker import errors

POLL_INTERVAL_S = 0.05  # of all jobs that are not final, and of all manifests
SLICE = 200  # final documents that are read again in each poll: none may change
FINAL = frozenset({"succeeded", "failed", "canceled", "expired"})
PATIENT = frozenset({"low", "bulk"})  # priorities that come after the others
UNEXPECTED = "internal"  # the code of an unexpected exception: a defect of ours


@cache
def codes() -> set[str]:
    """Every code that an error may have, except that of unexpected exceptions."""
    tree = [errors.GradcamError]
    for one in tree:
        tree += one.__subclasses__()
    return {one.code for one in tree} - {UNEXPECTED}


@dataclass
class Hit:
    """A job that ran when a fault hit its worker."""

    attempt: int
    since_s: float
    route: str  # its priority
    requeued: bool = False  # it is queued again, or more


class JobObserver:
    """Polls ledger and bucket in two threads and records what must not have happened."""

    def __init__(self, cluster: Cluster, *, forgotten: bool = False) -> None:
        """Observe the jobs that the cluster's client has submitted.

        `forgotten`: the run is longer than the time that the ledger keeps a final job for.
        """
        self._cluster, self._forgotten = cluster, forgotten
        self._prefix = cluster.settings.key_prefix
        self.finals: dict[str, str] = {}  # job id -> its final document, as text
        self.changed: set[str] = set()  # jobs whose final document has changed
        self.running: dict[str, tuple[int, str]] = {}  # job id -> attempt, worker: at the last poll
        self.early: set[str] = set()  # manifests seen before what they name
        self.manifests: dict[str, set[str]] = {}  # job id -> checksums of what was seen under its name
        self.polls = self.bucket_polls = 0
        self.recoveries: dict[str, list[float]] = {}  # priority -> seconds until a job ran again
        self.requeued: list[float] = []  # seconds until what was hit no longer passed for running
        self._hit: dict[str, Hit] = {}  # job id -> what has not run again yet
        self._fresh: dict[str, int] = {}  # manifest's job id -> when it was changed, at the last poll (ns)
        self._ended = threading.Event()
        self._door = threading.Lock()
        self._threads = [
            threading.Thread(target=self._keep, args=[look], daemon=True)
            for look in (self._read_documents, self._read_manifests)
        ]
        self._at = 0

    def __enter__(self) -> Self:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one in self._threads:
            one.join()

    def unfinished(self) -> int:
        """Accepted jobs that were not final at the last poll."""
        return len(self._cluster.accepted) - len(self.finals)

    def hit(self, worker: int | None = None) -> int:
        """A fault hits what runs now, on all workers or on the process that has just been killed.

        How many jobs that is.
        """
        ending, now = f":{worker}" if worker else "", time.monotonic()
        found = [
            (job_id, one["attempt"])
            for job_id, one in self.documents().items()
            if one and one["status"] == "running" and one["worker"]["id"].endswith(ending)
        ]
        with self._cluster.ledger as server, self._door:
            for job_id, attempt in found:
                route = server.hget(f"{self._prefix}job:{job_id}", "route")
                self._hit[job_id] = Hit(attempt, now, str(route))
        return len(found)

    def over(self) -> None:
        """The fault has ended: what it hit is given time from now on."""
        now = time.monotonic()
        with self._door:
            for one in self._hit.values():
                one.since_s = now

    def drain(self, seconds: float) -> float:
        """Wait until every accepted job is final, at most so long; return how long it took."""
        begun = time.monotonic()
        while self.unfinished() and time.monotonic() - begun < seconds:
            time.sleep(POLL_INTERVAL_S)
        return time.monotonic() - begun

    def documents(self) -> dict[str, dict[str, Any] | None]:
        """What the ledger holds of each accepted job just now, or held at its end where it may forget it."""
        with self._cluster.ledger as server:
            ids = list(self._cluster.accepted)
            texts = self._read(server, ids)
        if self._forgotten:
            texts = [text or self.finals.get(job_id) for job_id, text in zip(ids, texts, strict=True)]
        return {job_id: json.loads(text) if text else None for job_id, text in zip(ids, texts, strict=True)}

    def verdict(self, *, faults: int, expected: Callable[[str], Collection[str]] | None = None) -> Verdict:
        """What came of all of it; call it when all should be final.

        `expected`: job id -> what it may end as, `succeeded` or the code of its error; without it, every job
        has to succeed.
        """
        found = self.documents()
        known = {job_id: one for job_id, one in found.items() if one}
        verdict = Verdict(jobs=len(found), faults=faults, lost=len(found) - len(known))
        verdict.without_final_state = sum(one["status"] not in FINAL for one in known.values())
        doubled = {*self.changed, *(job_id for job_id, seen in self.manifests.items() if len(seen) > 1)}
        verdict.doubled = len(doubled)
        verdict.early_manifests = len(self.early)
        ends = {job_id: end_of(one) for job_id, one in known.items() if one["status"] in FINAL}
        verdict.untyped = sum(end not in {"succeeded", *codes()} for end in ends.values())
        wrong = {
            job_id: end
            for job_id, end in ends.items()
            if end not in (expected(job_id) if expected else {"succeeded"})
        }
        if wrong:
            counted = ", ".join(f"{count} {end}" for end, count in Counter(wrong.values()).most_common())
            example = next(iter(wrong))
            why = (known[example].get("error") or {}).get("detail", "")
            verdict.broken.append(
                f"{len(wrong)} jobs ended otherwise than they should: {counted}. {example}: {why}"
            )
        unsealed = [
            job_id
            for job_id, end in ends.items()
            if end == "succeeded" and not self._seals(job_id, known[job_id])
        ]
        if unsealed:
            verdict.broken.append(
                f"{len(unsealed)} jobs succeeded without the manifest that they name: {unsealed[0]}"
            )
        if self._cluster.unexpected:
            some = f"{len(self._cluster.unexpected)} times, at first with {self._cluster.unexpected[0]}"
            verdict.broken.append(f"The client raised undocumented errors, {some}")
        # Jobs of a lower priority wait for as long as others are there, whether a worker died or not.
        again = [one for route, some in self.recoveries.items() if route not in PATIENT for one in some]
        verdict.recovery_s_max = max([*again, *self.requeued], default=0.0)
        attempts = Counter(one["attempt"] for one in known.values())
        verdict.figures |= {
            "attempts_max": max(attempts, default=0),
            "jobs_run_again": sum(count for attempt, count in attempts.items() if attempt > 1),
            "requeued_s_max": round(max(self.requeued, default=0.0), 2),
            "runs_again_s_max": {route: round(max(some), 2) for route, some in self.recoveries.items()},
            "polls": self.polls,
            "bucket_polls": self.bucket_polls,
        }
        return verdict

    def _seals(self, job_id: str, document: dict[str, Any]) -> bool:
        path = self._manifest(job_id)
        named = (document.get("result") or {}).get("manifest_sha256")
        return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == named

    def _keep(self, look: Callable[[], None]) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(redis.RedisError):  # it is being attacked
                look()
            self._ended.wait(POLL_INTERVAL_S)

    def _read_documents(self) -> None:
        """A loop of its own, so that a connection lasts as long as its server does."""
        with self._cluster.ledger as server:
            while not self._ended.wait(POLL_INTERVAL_S):
                self._look(server)

    def _look(self, server: Any) -> None:
        open_ids = [job_id for job_id in list(self._cluster.accepted) if job_id not in self.finals]
        ended = list(self.finals)
        again = ended[self._at : self._at + SLICE]
        self._at = self._at + SLICE if self._at + SLICE < len(ended) else 0
        texts = self._read(server, [*open_ids, *again])
        running: dict[str, tuple[int, str]] = {}
        for job_id, text in zip(open_ids, texts, strict=False):
            document = json.loads(text) if text else None
            if document and document["status"] in FINAL:
                self.finals[job_id] = str(text)
            if document and document["status"] == "running":
                running[job_id] = (document["attempt"], document["worker"]["id"])
            if document:
                self._recovered(job_id, document)
        for job_id, text in zip(again, texts[len(open_ids) :], strict=True):
            if text != self.finals[job_id] and not (text is None and self._forgotten):
                self.changed.add(job_id)
        with self._door:
            self.running = running
        self.polls += 1

    def _recovered(self, job_id: str, document: dict[str, Any]) -> None:
        with self._door:
            hit = self._hit.get(job_id)
            if hit is None or (document["status"], document["attempt"]) == ("running", hit.attempt):
                return
            seconds = time.monotonic() - hit.since_s
            if not hit.requeued:
                hit.requeued = True
                self.requeued.append(seconds)
            if document["status"] == "running" or document["status"] in FINAL:
                self.recoveries.setdefault(hit.route, []).append(seconds)
                del self._hit[job_id]

    def _read(self, server: Any, ids: Iterable[str]) -> list[str | None]:
        with server.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(f"{self._prefix}job:{job_id}", "document")
            return list(pipeline.execute())

    def _manifest(self, job_id: str) -> Path:
        return self._cluster.bucket / "cams" / job_id / "manifest.json"

    def _read_manifests(self) -> None:
        for job_id in list(self._cluster.accepted):
            path = self._manifest(job_id)
            try:
                changed_at = path.stat().st_mtime_ns
                if self._fresh.get(job_id) == changed_at:
                    continue
                text = path.read_bytes()
                manifest = json.loads(text)
            except (OSError, ValueError):  # not there; or the server is just writing it
                continue
            self._fresh[job_id] = changed_at
            self.manifests.setdefault(job_id, set()).add(hashlib.sha256(text).hexdigest())
            if not self._whole(manifest):
                self.early.add(job_id)
        self.bucket_polls += 1

    def _whole(self, manifest: dict[str, Any]) -> bool:
        records = list(manifest["artifacts"])
        for explained in manifest["explanations"]:
            records += explained["artifacts"]
        for one in records:
            path = self._cluster.bucket / one["uri"].removeprefix("s3://results/")
            try:
                data = path.read_bytes()
            except OSError:
                return False
            if len(data) != one["bytes"] or hashlib.sha256(data).hexdigest() != one["sha256"]:
                return False
        return bool(records)


def end_of(document: dict[str, Any]) -> str:
    """How a job ended: `succeeded`, or the code of its error."""
    if document["status"] == "succeeded":
        return "succeeded"
    return str((document["error"] or {}).get("code", "none"))


def delivered(cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """Job id -> the final documents that the receiver of webhooks got, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in webhook_receiver.events(cluster.events):
        if event["data"]["status"] in FINAL:
            found.setdefault(event["data"]["id"], []).append(event["data"])
    return found
