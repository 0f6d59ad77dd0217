"""A fleet half of which runs an earlier release, while its processes are killed at random moments.

Of each release there are a worker, a delivery process, a Python client, a gateway and a backfill, where that
release has it. What one of them submits, another one cancels, follows or reads. Workers are killed, also with
their supervisors, and some are rolled as by an update; so are the others killed, and start again. Each of
`releases.EARLIER` has a fleet of its own.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, Self, cast

import httpx

from devtools.bench import backfill_command
from devtools.faults import release_client, releases
from devtools.faults.cluster import IMAGES, START_S, Cluster, Worker, running_cluster, wait_for
from devtools.faults.job_stream import JobStream
from devtools.faults.observer import FINAL, Document, JobObserver, delivered, end_of
from devtools.faults.proxy import Fault
from devtools.faults.releases import PRESENT, Release
from devtools.faults.tiny_network import NETWORK
from devtools.faults.verdict import Verdict
from devtools.processes import children
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job

JOBS_A_KILL = 15  # at least
AHEAD = 40  # jobs that wait or run at a time
EVERY_S = 0.08  # between two submissions
SLOW = Fault(latency_s=0.05)  # of the S3 server: a job takes a second, so that kills hit jobs
ROWS_A_KILL, MOST_ROWS = 40, 2000  # of each backfill
SHARD_ROWS = 16
KILL_S = 5.0  # that a kill takes, about: a backfill is as long as all of them
FAULTS = {
    "kill": 10,
    "kill_supervisor": 2,
    "roll": 2,
    "kill_delivery": 2,
    "kill_gateway": 2,
    "kill_backfill": 3,
}
BETWEEN = 8  # jobs that end between two faults: else workers are killed at their start alone
LATER_S = 0.8  # at most, after a worker has begun a job
CANCELED, REPEATED, NOTIFIED, WATCHED = 0.1, 0.15, 0.3, 0.2  # shares of the jobs
ANSWER_S = 60.0  # of a client or a gateway
FOLLOWED_S = release_client.WATCH_S + 30
RECOVERS_S = 30.0  # a killed worker's jobs are queued again within this time
DRAINS_S = 180.0  # all is final so long after the last kill, or never
DELIVERED_S = 120.0  # and delivered
BACKFILL_S = 300.0  # and so long may a backfill take after that
# Of a document: each reader has to know them.
READ = ("id", "status", "revision", "attempt", "error", "result", "predictions")


class Unreachable(Exception):
    """A gateway that was killed; it is asked again."""


class Program:
    """A command of a release below a keeper, which can be killed and started again."""

    def __init__(self, release: Release, cluster: Cluster, *words: str) -> None:
        """Start it."""
        self._release, self._settings, self._words = release, cluster.settings, words
        self.log = cluster.folder / f"{release.name}.log"
        self.start()

    def start(self, *more: str) -> None:
        """Start it, with more words."""
        command = self._release.command(*self._words, *more)
        self.keeper = self._release.spawn(command, self._settings, self.log)

    def kill(self) -> None:
        """SIGKILL."""
        for pid in children(self.keeper.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> int:
        """Cleanly; its exit code."""
        return parent_watch.stop(self.keeper)


class Client:
    """The Python client of a release; see `release_client`."""

    def __init__(self, release: Release, cluster: Cluster) -> None:
        """Start it."""
        self.name = f"client of {release.name}"
        program = [sys.executable, "-P", release_client.__file__, release.package]
        with (cluster.folder / f"{release.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                release.words(program, cluster.settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._input, self._output = (
            cast("IO[str]", self._process.stdin),
            cast("IO[str]", self._process.stdout),
        )
        self._asked: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def submit(self, job: Job) -> str:
        """Submit a job; its id."""
        return str(self.ask("submit", job.model_dump(mode="json", exclude_unset=True)).result(ANSWER_S))

    def cancel(self, job_id: str) -> str:
        """Cancel a job; its status."""
        return str(self.ask("cancel", job_id).result(ANSWER_S))

    def watch(self, job_id: str) -> list[list[Any]]:
        """Status, revision and attempt of each document that came, to the final one."""
        seen: list[list[Any]] = self.ask("watch", job_id).result(FOLLOWED_S)
        return seen

    def ask(self, call: str, given: object) -> Future[Any]:
        """Call something."""
        future: Future[Any] = Future()
        with self._lock:
            number = len(self._asked)
            self._asked[number] = future
            self._input.write(json.dumps({"number": number, "call": call, "given": given}) + "\n")
            self._input.flush()
        return future

    def _listen(self) -> None:
        for line in self._output:
            told = json.loads(line)
            future = self._asked[told["number"]]
            if "answer" in told:
                future.set_result(told["answer"])
                continue
            name, detail = told["error"]
            error = (
                LedgerUnavailable(detail)
                if name == "LedgerUnavailable"
                else RuntimeError(f"{name}: {detail}")
            )
            future.set_exception(error)

    def close(self) -> None:
        """The end of it."""
        self._process.terminate()
        self._process.wait()


class Gateway:
    """`gradcam serve` of a release."""

    def __init__(self, release: Release, cluster: Cluster) -> None:
        """Start it."""
        self.name = f"gateway of {release.name}"
        port = servers.free_port()
        self.program = Program(release, cluster, "serve", "--port", str(port))
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S)

    def submit(self, job: Job) -> str:
        """Submit a job; its id."""
        return str(self._post("", content=job.model_dump_json(exclude_unset=True))["id"])

    def cancel(self, job_id: str) -> str:
        """Cancel a job; its status."""
        return str(self._post(f"/{job_id}/cancel")["status"])

    def _post(self, path: str, content: str = "") -> Any:
        try:
            answer = self._http.post(
                f"/v1/jobs{path}", content=content, headers={"content-type": "application/json"}
            )
        except httpx.TransportError as error:
            raise Unreachable(repr(error)) from error
        if answer.status_code >= 500:  # noqa: PLR2004
            raise Unreachable(answer.text)
        if answer.is_error:
            message = f"{self.name} answered {answer.status_code}: {answer.text}"
            raise RuntimeError(message)
        return answer.json()

    def watch(self, job_id: str) -> list[list[Any]]:
        """Status, revision and attempt of each document that came, to the final one."""
        seen: list[list[Any]] = []
        end = time.monotonic() + FOLLOWED_S
        while time.monotonic() < end and (not seen or seen[-1][0] not in FINAL):
            with contextlib.suppress(httpx.TransportError):
                self._follow(job_id, seen)
            time.sleep(0.1)
        return seen

    def _follow(self, job_id: str, seen: list[list[Any]]) -> None:
        headers = {"last-event-id": str(seen[-1][1])} if seen else {}
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            kind = ""
            for line in answer.iter_lines():
                kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
                if line.startswith("data: ") and kind == "status":
                    document = json.loads(line.removeprefix("data: "))
                    seen.append([document["status"], document["revision"], document["attempt"]])

    def close(self) -> None:
        """The end of it."""
        self._http.close()
        self.program.stop()


class Backfill:
    """`gradcam backfill` of a release, which is continued after each kill until it has ended by itself."""

    def __init__(self, cluster: Cluster, release: Release, rows: int, rate: float) -> None:
        """Start it, so slowly that it lasts as long as the kills."""
        self.release, self.rows = release, rows
        self.output = f"{cluster.settings.output}/backfill-{release.name}"
        uris = (f"s3://photos/{number % IMAGES}.jpg" for number in range(rows))
        source = backfill_command.write_input(cluster.folder / f"{release.name}.csv", uris)
        options = ["--shard-rows", str(SHARD_ROWS), "--rate", f"{rate:.1f}"]
        words = backfill_command.command(source, self.output, NETWORK, *options)
        self.program = Program(release, cluster, *words[words.index("backfill") :])

    @property
    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self.program.keeper.poll() is None

    def kill(self) -> None:
        """Kill it and go on with it."""
        self.program.kill()
        self.program.start("--resume")

    def finish(self) -> int:
        """Wait for its end; its exit code."""
        return self.program.keeper.wait(BACKFILL_S)


class Caller(Protocol):
    """A client or a gateway."""

    name: str

    def submit(self, job: Job) -> str:
        """Submit a job; its id."""

    def cancel(self, job_id: str) -> str:
        """Cancel a job; its status."""

    def watch(self, job_id: str) -> list[list[Any]]:
        """Status, revision and attempt of each document that came, to the final one."""


@dataclass
class MixedFleet:
    """What runs of both releases, and what was done with it."""

    cluster: Cluster
    observer: JobObserver
    releases: tuple[Release, ...]
    kills: int
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)  # fault -> how often
    struck: Counter[str] = field(default_factory=Counter)  # release -> faults of its worker
    by: Counter[str] = field(default_factory=Counter)  # caller -> jobs that it submitted
    cancels: dict[str, Future[str]] = field(default_factory=dict)  # job id -> the answer: its status
    watches: dict[str, tuple[str, Future[Any]]] = field(default_factory=dict)  # job id -> by whom, what came
    pids: dict[int, str] = field(default_factory=dict)  # worker process -> its release
    broken: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Start all of it."""
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(64))
        self.clients: list[Client] = []
        self.gateways: list[Gateway] = []
        self.deliveries: list[Program] = []
        self.backfills: list[Backfill] = []
        rows = min(ROWS_A_KILL * self.kills, MOST_ROWS)
        for release in self.releases:
            self.cluster.work(release=release)
            self.deliveries.append(Program(release, self.cluster, "deliver"))
            self._stack.callback(self.deliveries[-1].stop)
            self.clients.append(Client(release, self.cluster))
            self._stack.callback(self.clients[-1].close)
            if release.has_gateway:
                self.gateways.append(Gateway(release, self.cluster))
                self._stack.callback(self.gateways[-1].close)
            if release is not PRESENT or all(one.runs_present_shards for one in self.releases):
                self.backfills.append(Backfill(self.cluster, release, rows, rows / (KILL_S * self.kills)))
                self._stack.callback(self.backfills[-1].program.stop)
        self.callers: list[Caller] = [*self.clients, *self.gateways]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all of it."""
        self._stack.close()

    def make(self, number: int) -> Job:
        """The job of this number."""
        draw = random.Random(f"{number} {self.cluster.seed}")  # noqa: S311  # repeatable, not secret
        changes: dict[str, Any] = {"metadata": {"number": str(number)}}
        if draw.random() < NOTIFIED:
            changes["webhooks"] = self.cluster.hook()
        if draw.random() < REPEATED:
            changes["idempotency_key"] = f"key {number}"
        return self.cluster.job(number, **changes)

    def submit(self, job: Job) -> None:
        """Submit a job by a caller, and let other ones do with it what callers do."""
        draw = random.Random(job.id)  # noqa: S311  # repeatable, not secret
        caller, other, third = (draw.choice(self.callers) for _ in range(3))
        try:
            self._check_id(job, caller, caller.submit(job))
        except Unreachable as error:
            raise LedgerUnavailable(str(error)) from error
        self.by[caller.name] += 1
        if job.idempotency_key:
            again = job.model_copy(update={"id": new_id()})
            self._check_id(job, other, self._insist(partial(other.submit, again)))
        if draw.random() < CANCELED:
            later_s = draw.uniform(0, LATER_S)
            self.cancels[job.id] = self._pool.submit(self._cancel, other, job.id, later_s)
        if draw.random() < WATCHED:
            self.watches[job.id] = third.name, self._pool.submit(third.watch, job.id)

    def _check_id(self, job: Job, caller: Caller, told: str) -> None:
        if told != job.id:
            self.broken.append(f"The {caller.name} calls job {job.id} {told}.")

    def _cancel(self, caller: Caller, job_id: str, later_s: float) -> str:
        time.sleep(later_s)
        return self._insist(partial(caller.cancel, job_id))

    def _insist(self, ask: Callable[[], str]) -> str:
        end = time.monotonic() + ANSWER_S
        while True:
            try:
                return ask()
            except (Unreachable, LedgerUnavailable):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def strike(self) -> None:
        """Make one more fault."""
        names = [name for name in FAULTS if self._possible(name)]
        [name] = self.random.choices(names, [FAULTS[name] for name in names])
        getattr(self, f"_{name}")()
        self.done[name] += 1

    def _possible(self, fault: str) -> bool:
        return fault != "kill_backfill" or any(backfill.running for backfill in self.backfills)

    def _busy(self) -> tuple[Worker, int]:
        """A worker that has jobs in hand, and its process, a moment after it had."""
        worker = self.random.choice(self.cluster.workers)
        while True:
            wait_for(lambda: self._works(worker), START_S, f"the worker takes jobs, see {worker.log}")
            time.sleep(self.random.uniform(0, LATER_S))
            if pid := worker.process:
                self.struck[worker.release.name] += 1
                return worker, pid

    def _works(self, worker: Worker) -> bool:
        pid = worker.process
        if pid:
            self.pids[pid] = worker.release.name
        return any(on.endswith(f":{pid}") for _, on in self.observer.running.values())

    def _kill(self) -> None:
        _, pid = self._busy()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.done["jobs_hit"] += self.observer.hit(pid)

    def _kill_supervisor(self) -> None:
        worker, pid = self._busy()
        for one in (worker.supervisor, pid):
            if one:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        self.done["jobs_hit"] += self.observer.hit(pid)
        self._replace(worker)

    def _roll(self) -> None:
        """As an update does it: SIGTERM, and another one in its place."""
        worker, _ = self._busy()
        self._replace(worker)

    def _replace(self, worker: Worker) -> None:
        worker.stop()
        self.cluster.workers.remove(worker)
        self.cluster.work(release=worker.release)

    def _kill_delivery(self) -> None:
        program = self.random.choice(self.deliveries)
        program.kill()
        program.start()

    def _kill_gateway(self) -> None:
        program = self.random.choice(self.gateways).program
        program.kill()
        program.start()

    def _kill_backfill(self) -> None:
        self.random.choice([one for one in self.backfills if one.running]).kill()


def attack(count: int, seed: int) -> Verdict:
    """Make `count` faults in a fleet with each of the earlier releases."""
    verdict = Verdict()
    for earlier in releases.EARLIER:
        with tempfile.TemporaryDirectory(prefix="gradcam-release-") as folder:
            verdict.add(earlier.commit, _attack(earlier.unpack(Path(folder)), count, seed))
    return verdict


def _attack(previous: Release, count: int, seed: int) -> Verdict:
    draw = random.Random(seed)  # noqa: S311  # repeatable, not secret
    with (
        running_cluster(f"mixed {previous.name}", seed) as cluster,
        JobObserver(cluster) as observer,
        MixedFleet(cluster, observer, (previous, PRESENT), count, draw) as fleet,
    ):
        stream = JobStream(
            cluster,
            observer.unfinished,
            JOBS_A_KILL * count,
            AHEAD,
            endless=True,
            make=fleet.make,
            submit=fleet.submit,
            every_s=EVERY_S,
        )
        with cluster.s3.proxy.suffering(SLOW), stream:
            wait_for(lambda: len(observer.finals) > AHEAD, START_S, "jobs end")
            for _ in range(count):
                ended = len(observer.finals)
                fleet.strike()
                wait_for(lambda: len(observer.finals) >= ended + BETWEEN, 2 * START_S, "jobs end again")  # noqa: B023
            stream.join()
        drained_s = observer.drain(DRAINS_S)

        def expected(job_id: str) -> set[str]:
            return {"succeeded", "canceled"} if job_id in fleet.cancels else {"succeeded"}

        verdict = observer.verdict(faults=count, expected=expected)
        verdict.broken += fleet.broken
        documents = {job_id: document for job_id, document in observer.documents().items() if document}
        _check_cancels(fleet, documents, verdict)
        _check_watches(fleet, documents, verdict)
        _check_webhooks(cluster, stream.made, documents, verdict)
        _check_readings(fleet, documents, verdict)
        _check_results(cluster, stream.made, documents, verdict)
        _check_backfills(fleet, verdict)
    workers = [str((document["worker"] or {}).get("id", "")) for document in documents.values()]
    done_by = Counter(fleet.pids.get(int(one.rpartition(":")[2] or 0), "unknown") for one in workers)
    for release in (previous, PRESENT):
        verdict.require(done_by[release.name], f"No job ended on a worker of {release.name}: {done_by}.")
    verdict.require(fleet.done["jobs_hit"], "No kill hit a job: nothing was tested.")
    queued_s = verdict.figures["requeued_s_max"]
    verdict.require(queued_s <= RECOVERS_S, f"A killed job was queued again after {queued_s:.0f} s only.")
    verdict.figures |= {**fleet.done, "submitted_by": dict(fleet.by), "ended_on": dict(done_by)}
    verdict.figures["workers_struck"] = dict(fleet.struck)
    verdict.figures["drained_s"] = round(drained_s, 1)
    return verdict


def _check_cancels(fleet: MixedFleet, documents: dict[str, Document], verdict: Verdict) -> None:
    """Whoever was told of an end was told the truth."""
    told = {job_id: future.result(ANSWER_S + FOLLOWED_S) for job_id, future in fleet.cancels.items()}
    ends = {job_id: documents[job_id]["status"] for job_id in told}
    wrong = [job_id for job_id, end in ends.items() if told[job_id] in FINAL and told[job_id] != end]
    verdict.forbid(wrong, "jobs ended otherwise than whoever cancelled them was told")
    verdict.figures |= {"asked_to_cancel": len(ends), "canceled": Counter(ends.values())["canceled"]}


def _check_watches(fleet: MixedFleet, documents: dict[str, Document], verdict: Verdict) -> None:
    """Who follows a job sees it go forward, and its end."""
    for job_id, (who, future) in fleet.watches.items():
        try:
            seen = future.result(FOLLOWED_S)
        except Exception as error:  # noqa: BLE001  # a finding
            verdict.broken.append(f"The {who}, which followed {job_id}: {error!r}")
            continue
        revisions = [revision for _, revision, _ in seen]
        end = documents[job_id]
        whole = seen and seen[-1] == [end["status"], end["revision"], end["attempt"]]
        forward = revisions == sorted(set(revisions))
        verdict.require(whole and forward, f"The {who} saw {seen} of {job_id}, which ended as {end}.")
    verdict.figures["followed"] = len(fleet.watches)


def _check_webhooks(
    cluster: Cluster, jobs: list[Job], documents: dict[str, Document], verdict: Verdict
) -> None:
    """Every job's end, at least once, and always as the ledger has it."""
    notified = {job.id for job in jobs if job.webhooks}
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: notified <= delivered(cluster).keys(), DELIVERED_S, "every end is delivered")
    events = delivered(cluster)
    verdict.forbid(notified - events.keys(), "jobs whose end was not delivered")
    verdict.forbid(events.keys() - notified, "jobs without a webhook were delivered")
    wrong = [
        job_id for job_id, ends in events.items() if any(misread(end, documents[job_id]) for end in ends)
    ]
    verdict.forbid(wrong, "jobs whose end was delivered otherwise than the ledger has it")
    verdict.figures["delivered"] = len(events)
    verdict.figures["delivered_twice"] = sum(len(ends) > 1 for ends in events.values())


def misread(read: Document, document: Document) -> list[str]:
    """The names of what is read otherwise than it is written, and of what is never left out."""
    both = {*READ, *(read.keys() & document.keys())}
    return [name for name in both if read.get(name) != document.get(name)]


def _check_readings(fleet: MixedFleet, documents: dict[str, Document], verdict: Verdict) -> None:
    """The clients of both releases read all that either has written."""
    for client in fleet.clients:
        readings = client.ask("read", list(documents)).result(ANSWER_S)
        verdict.forbid(documents.keys() - readings.keys(), f"jobs are unknown to the {client.name}")
        wrong = {
            job_id: names for job_id, read in readings.items() if (names := misread(read, documents[job_id]))
        }
        verdict.forbid(wrong.items(), f"documents are misread by the {client.name}")


def _check_results(
    cluster: Cluster, jobs: list[Job], documents: dict[str, Document], verdict: Verdict
) -> None:
    """Each job has what it asked for, and the same image has the same scores and pixels in all of them."""
    scores: dict[str, set[str]] = {}
    pixels: dict[tuple[str, str, int], set[str]] = {}
    for job in jobs:
        if end_of(documents[job.id]) != "succeeded":
            continue
        manifest = json.loads(cluster.manifest(job.id).read_bytes())
        uri = str(job.image.uri)
        scores.setdefault(uri, set()).add(
            json.dumps([(one["id"], one["probability"]) for one in manifest["predictions"][:1]])
        )
        explanations = manifest["explanations"]
        kinds = {artifact.kind for artifact in job.artifacts}
        made = {record["kind"] for one in [manifest, *explanations] for record in one["artifacts"]}
        whole = len(explanations) == job.target.top_n and kinds <= made
        verdict.require(
            whole, f"Job {job.id} has {len(explanations)} explanations and {made}, asked for {job}."
        )
        for explanation in explanations:
            for record in explanation["artifacts"]:
                if record["kind"] == "overlay":
                    key = uri, record["kind"], explanation["class"]["id"]
                    pixels.setdefault(key, set()).add(record["sha256"])
    verdict.forbid([some for some in scores.values() if len(some) > 1], "images have several scores")
    verdict.forbid([some for some in pixels.values() if len(some) > 1], "images have several overlays")
    verdict.figures["overlays_compared"] = len(pixels)


def _check_backfills(fleet: MixedFleet, verdict: Verdict) -> None:
    """Each of them ends, and has each of its rows once."""
    for backfill in fleet.backfills:
        try:
            code = backfill.finish()
        except subprocess.TimeoutExpired:
            verdict.broken.append(f"The backfill of {backfill.release.name} has not ended.")
            continue
        tail = backfill.program.log.read_text(errors="replace")[-500:]
        verdict.require(code == 0, f"The backfill of {backfill.release.name} ended with {code}: {tail}")
        counted = backfill_command.counted(fleet.cluster.settings, backfill.output, backfill.rows)
        verdict.lost += counted.lost
        verdict.doubled += counted.doubled
        verdict.figures[f"rows_of_{backfill.release.name}"] = backfill.rows
