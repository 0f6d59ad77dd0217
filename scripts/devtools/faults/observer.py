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
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

import redis

from devtools.faults import webhook_receiver
from devtools.faults.cluster import Cluster
from devtools.faults.verdict import Verdict
from gradcam_worker import errors

POLL_INTERVAL_S = 0.1  # of all jobs that are not final, and of all manifests
SLICE = 20  # final documents that are read again in each poll: none may change
FINAL = frozenset({"succeeded", "failed", "canceled", "expired"})
PATIENT = frozenset({"low", "bulk"})  # priorities that come after the others
UNEXPECTED = "internal"  # the code of an unexpected exception: a defect of ours

Document = dict[str, Any]


@cache
def codes() -> set[str]:
    """Every code that an error may have, except that of unexpected exceptions."""
    tree = [errors.GradcamError]
    for error in tree:
        tree += error.__subclasses__()
    return {error.code for error in tree} - {UNEXPECTED}


@lru_cache(1024)
def parsed(text: str) -> Document:
    """A document as it lies there, which nobody may change: most are read several times."""
    document: Document = json.loads(text)
    return document


def sha256(data: bytes) -> str:
    """The checksum of an object."""
    return hashlib.sha256(data).hexdigest()


def end_of(document: Document) -> str:
    """How a job ended: `succeeded`, or the code of its error."""
    if document["status"] == "succeeded":
        return "succeeded"
    return str((document["error"] or {}).get("code", "none"))


def delivered(cluster: Cluster) -> dict[str, list[Document]]:
    """Job id -> the final documents that the receiver of webhooks got, in their order."""
    documents: dict[str, list[Document]] = {}
    for event in webhook_receiver.events(cluster.folder / "events.jsonl"):
        if event["data"]["status"] in FINAL:
            documents.setdefault(event["data"]["id"], []).append(event["data"])
    return documents


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
        self.finals: dict[str, str] = {}  # job id -> its final document, as text
        self.changed: set[str] = set()  # jobs whose final document has changed
        self.running: dict[str, tuple[int, str]] = {}  # job id -> attempt, worker: at the last poll
        self.early: set[str] = set()  # manifests seen before what they name
        self.manifests: dict[str, set[str]] = {}  # job id -> checksums of what was seen under its name
        self.polls: Counter[str] = Counter()  # of the ledger, and of the bucket
        self.recoveries: dict[str, list[float]] = {}  # priority -> seconds until a job ran again
        self.requeued: list[float] = []  # seconds until what was hit no longer passed for running
        self._hit: dict[str, Hit] = {}  # job id -> what has not run again yet
        self._fresh: dict[str, int] = {}  # manifest's job id -> when it was changed, at the last poll (ns)
        self._next_final = 0  # from which on final documents are read again
        self._ended, self._lock = threading.Event(), threading.Lock()
        polls = (self._poll_ledger, self._poll_bucket)
        self._threads = [threading.Thread(target=poll, daemon=True) for poll in polls]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def unfinished(self) -> int:
        """Accepted jobs that were not final at the last poll."""
        return len(self._cluster.accepted) - len(self.finals)

    def hit(self, worker: int | None = None) -> int:
        """A fault hits what runs now, on all workers or on the process that has just been killed.

        How many jobs that is.
        """
        ending, now = f":{worker}" if worker else "", time.monotonic()
        hits = [
            (job_id, document["attempt"])
            for job_id, document in self.documents().items()
            if document and document["status"] == "running" and document["worker"]["id"].endswith(ending)
        ]
        with self._cluster.ledger as server, self._lock:
            for job_id, attempt in hits:
                route = str(server.hget(self._key(job_id), "route"))
                self._hit[job_id] = Hit(attempt, now, route)
        return len(hits)

    def over(self) -> None:
        """The fault has ended: what it hit is given time from now on."""
        now = time.monotonic()
        with self._lock:
            for hit in self._hit.values():
                hit.since_s = now

    def drain(self, seconds: float) -> float:
        """Wait until every accepted job is final, at most so long; return how long it took."""
        begun = time.monotonic()
        while self.unfinished() and time.monotonic() - begun < seconds:
            time.sleep(POLL_INTERVAL_S)
        return time.monotonic() - begun

    def documents(self) -> dict[str, Document | None]:
        """What the ledger holds of each accepted job just now, or held at its end where it may forget it."""
        return {job_id: json.loads(text) if text else None for job_id, text in self._texts().items()}

    def _texts(self) -> dict[str, str | None]:
        with self._cluster.ledger as server:
            texts = self._read(server, list(self._cluster.accepted))
        if self._forgotten:
            texts = {job_id: text or self.finals.get(job_id) for job_id, text in texts.items()}
        return texts

    def verdict(self, *, faults: int, expected: Callable[[str], Collection[str]] | None = None) -> Verdict:
        """What came of all of it; call it when all should be final.

        `expected`: job id -> what it may end as, `succeeded` or the code of its error; without it, every job
        has to succeed.
        """
        texts = self._texts()
        self.changed.update(job_id for job_id, text in [*self.finals.items()] if text != texts[job_id])
        documents = {job_id: json.loads(text) if text else None for job_id, text in texts.items()}
        known = {job_id: document for job_id, document in documents.items() if document}
        ends = {job_id: end_of(document) for job_id, document in known.items() if document["status"] in FINAL}
        # Jobs of a lower priority wait for as long as others are there, whether a worker died or not.
        urgent = [max(seconds) for route, seconds in self.recoveries.items() if route not in PATIENT]
        attempts = [document["attempt"] for document in known.values()]
        verdict = Verdict(
            jobs=len(documents),
            faults=faults,
            lost=len(documents) - len(known),
            without_final_state=len(known) - len(ends),
            doubled=len(self.changed | {job_id for job_id, seen in self.manifests.items() if len(seen) > 1}),
            early_manifests=len(self.early),
            untyped=sum(end not in {"succeeded", *codes()} for end in ends.values()),
            recovery_s_max=max([*urgent, *self.requeued], default=0.0),
            figures={
                "attempts_max": max(attempts, default=0),
                "jobs_run_again": sum(attempt > 1 for attempt in attempts),
                "requeued_s_max": round(max(self.requeued, default=0.0), 2),
                "runs_again_s_max": {route: round(max(some), 2) for route, some in self.recoveries.items()},
                "polls": dict(self.polls),
            },
        )
        allowed = expected or (lambda _: {"succeeded"})
        for end, number in Counter(ends.values()).items():
            wrong = [job_id for job_id in ends if ends[job_id] == end and end not in allowed(job_id)]
            why = [(known[job_id].get("error") or {}).get("detail", "") for job_id in wrong[:1]]
            verdict.forbid(wrong, f"of {number} {end} jobs should have ended otherwise, {why}")
        unsealed = [
            id_ for id_, end in ends.items() if end == "succeeded" and not self._seals(known[id_], id_)
        ]
        verdict.forbid(unsealed, "jobs succeeded without the manifest that they name")
        verdict.forbid(self._cluster.unexpected, "undocumented errors were raised by the client")
        return verdict

    def _key(self, job_id: str) -> str:
        return f"{self._cluster.settings.key_prefix}job:{job_id}"

    def _seals(self, document: Document, job_id: str) -> bool:
        """Whether the manifest that a document names is there."""
        path = self._cluster.manifest(job_id)
        named = (document.get("result") or {}).get("manifest_sha256")
        return path.exists() and sha256(path.read_bytes()) == named

    def _poll_ledger(self) -> None:
        while not self._ended.is_set():
            # A connection lasts as long as its server does, which is being attacked.
            with contextlib.suppress(redis.RedisError), self._cluster.ledger as server:
                while not self._ended.wait(POLL_INTERVAL_S):
                    self._look(server)
            self._ended.wait(POLL_INTERVAL_S)

    def _look(self, server: Any) -> None:
        ended = list(self.finals)
        again = ended[self._next_final : self._next_final + SLICE]
        self._next_final = self._next_final + SLICE if self._next_final + SLICE < len(ended) else 0
        for job_id, text in self._read(server, again).items():
            if text != self.finals[job_id] and not (text is None and self._forgotten):
                self.changed.add(job_id)
        unfinished = [job_id for job_id in list(self._cluster.accepted) if job_id not in self.finals]
        running: dict[str, tuple[int, str]] = {}
        for job_id, text in self._read(server, unfinished).items():
            if text is None:
                continue
            document = parsed(text)
            if document["status"] in FINAL:
                self.finals[job_id] = text
            elif document["status"] == "running":
                running[job_id] = (document["attempt"], document["worker"]["id"])
            self._recovered(job_id, document)
        with self._lock:
            self.running = running
        self.polls["ledger"] += 1

    def _recovered(self, job_id: str, document: Document) -> None:
        with self._lock:
            hit = self._hit.get(job_id)
            if hit is None or (document["status"], document["attempt"]) == ("running", hit.attempt):
                return
            seconds = time.monotonic() - hit.since_s
            if not hit.requeued:
                hit.requeued = True
                self.requeued.append(seconds)
            if document["status"] in {"running", *FINAL}:
                self.recoveries.setdefault(hit.route, []).append(seconds)
                del self._hit[job_id]

    def _read(self, server: Any, ids: Iterable[str]) -> dict[str, str | None]:
        ids = list(ids)
        with server.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(self._key(job_id), "document")
            return dict(zip(ids, pipeline.execute(), strict=True))

    def _poll_bucket(self) -> None:
        paths: dict[str, Path] = {}  # to make one costs more than to ask for the file
        while not self._ended.wait(POLL_INTERVAL_S):
            for job_id in list(self._cluster.accepted):
                path = paths.get(job_id) or paths.setdefault(job_id, self._cluster.manifest(job_id))
                with contextlib.suppress(OSError, ValueError):  # not there; or the server is just writing it
                    self._read_manifest(job_id, path)
            self.polls["bucket"] += 1

    def _read_manifest(self, job_id: str, path: Path) -> None:
        changed_at = path.stat().st_mtime_ns
        if self._fresh.get(job_id) == changed_at:
            return
        text = path.read_bytes()
        manifest = json.loads(text)
        self._fresh[job_id] = changed_at
        self.manifests.setdefault(job_id, set()).add(sha256(text))
        if not self._whole(manifest):
            self.early.add(job_id)

    def _whole(self, manifest: dict[str, Any]) -> bool:
        """Whether the objects that a manifest names are there, as it says."""
        records = manifest["artifacts"].copy()
        for explanation in manifest["explanations"]:
            records += explanation["artifacts"]
        paths = [self._cluster.bucket / record["uri"].removeprefix("s3://results/") for record in records]
        stored = [path.read_bytes() if path.exists() else b"" for path in paths]
        named = [(record["bytes"], record["sha256"]) for record in records]
        return bool(records) and named == [(len(data), sha256(data)) for data in stored]
