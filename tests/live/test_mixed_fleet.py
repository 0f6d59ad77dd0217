"""A fleet in the middle of an upgrade: workers and clients of the previous release beside those of this one.

The previous release is a wheel in the folder `previous`, made by `scripts/previous-release`. It runs as it
did, but for its network, which costs nothing.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis

from devtools.faults import tiny_network, tiny_worker
from devtools.processes import children
from gradcam_worker.broker import envelope, publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live]

WAIT_S = 100
PROGRAM = Path(__file__).parent / "previous" / "previous_release.py"
RELEASES = ("previous", "present")
THREADS = 3
PRIORITIES, EACH = ("high", "normal", "low", "bulk"), 4  # so many jobs of each, by either client
SLOW_S = 0.3  # that each image takes: at a kill, a worker has jobs in hand


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.1)  # each look reads and parses every job


@dataclass
class Fleet:
    """A broker, and whatever of either release is asked for."""

    settings: Settings
    folder: Path
    package: Path  # of the previous release
    answers: "subprocess.Popen[str]"  # its client
    image: str
    hook: str
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client, self.ledger = GradcamClient(settings=self.settings), RedisLedger(self.settings)

    def environment(self, release: str) -> dict[str, str]:
        """What an operator of that release would have set."""
        usual = Settings().to_environment()
        own = {name: value for name, value in self.settings.to_environment().items() if value != usual[name]}
        return {**own, "PYTHONPATH": str(self.package) if release == "previous" else ""}

    def submit(self, release: str, *wishes: dict[str, Any]) -> list[dict[str, Any]]:
        """A job for each wish; what the client of that release was given."""
        asked = [
            {
                "id": new_id(),
                "image": self.image,
                "network": tiny_network.NETWORK,
                "target": {"top_n": 2},
                "max_attempts": 9,
                "webhooks": [{"url": self.hook}],
                **wish,
            }
            for wish in wishes
        ]
        told = self.hand_in(release, asked)
        assert told == [one["id"] for one in asked]
        self.ids += told
        return asked

    def submit_for(self, tenant: Tenant, number: int) -> None:
        """Jobs of a tenant, which only the present release knows."""
        wish = {
            "image": self.image,
            "network": tiny_network.NETWORK,
            "target": {"top_n": 2},
            "max_attempts": 9,
        }
        jobs = [Job.parse({**wish, "webhooks": [{"url": self.hook}]}) for _ in range(number)]
        self.ledger.submit_many(jobs, tenant=tenant)
        publisher.Publisher(self.settings).publish((job, None) for job in jobs)
        self.ids += [job.id for job in jobs]

    def hand_in(self, release: str, asked: list[dict[str, Any]]) -> Any:
        """The ids by which the client of that release knows these jobs."""
        return self.previous("submit", asked) if release == "previous" else self.client.submit_many(asked)

    def previous(self, command: str, given: object) -> Any:
        """What the previous release answers, given this."""
        assert self.answers.stdin
        assert self.answers.stdout
        asked = {"command": command, "environment": self.environment("previous"), "given": given}
        self.answers.stdin.write(json.dumps(asked) + "\n")
        self.answers.stdin.flush()
        return json.loads(self.answers.stdout.readline() or '"it has ended"')

    @contextlib.contextmanager
    def worker(self, release: str) -> Iterator["subprocess.Popen[bytes]"]:
        environment = self.environment(release)
        previous = [sys.executable, "-P", str(PROGRAM), "supervise"]
        command = previous if release == "previous" else tiny_worker.command()
        # The keeper above it is this release's own, and has no other package on its path.
        keeper = parent_watch.spawn(
            ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
            log=self.folder / f"{release}.log",
            grace_s=self.settings.shutdown_timeout_s + 15,
        )
        try:
            yield keeper
        finally:
            parent_watch.stop(keeper)

    def documents(self) -> list[StatusDocument]:
        return list(self.ledger.read_many(self.ids).values())

    def in_hand(self) -> set[str]:
        return {one.id for one in self.documents() if one.status == "running"}

    def works(self, keeper: "subprocess.Popen[bytes]") -> bool:
        """Whether the worker below this keeper has a job in hand."""
        end = f":{process(keeper)}"
        workers = [one.worker for one in self.documents() if one.status == "running"]
        return any(worker is not None and worker.id.endswith(end) for worker in workers)

    def all_final(self) -> bool:
        return all(one.final for one in self.documents())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The previous release, unpacked."""
    [wheel] = PROGRAM.parent.glob("*.whl")
    folder = tmp_path_factory.mktemp("previous")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def answers(package: Path) -> Iterator["subprocess.Popen[str]"]:
    """The client of the previous release."""
    with subprocess.Popen(
        [sys.executable, "-P", str(PROGRAM), "answer"],
        env=os.environ | {"PYTHONPATH": str(package)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Images come when it is open."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def fleet(
    tmp_path: Path,
    package: Path,
    answers: "subprocess.Popen[str]",
    http_server: Any,
    answer: Any,
    gate: threading.Event,
) -> Iterator[Fleet]:
    def slow() -> None:
        gate.wait(WAIT_S)
        time.sleep(SLOW_S)

    data = cv2.imencode(".png", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
    image = http_server.url("/image.png", answer(200, data, before=slow))
    hook = http_server.url("/told", answer(204))
    with servers.valkey(tmp_path) as server:
        settings = Settings(
            broker_url=f"redis://127.0.0.1:{server.port}/0",
            output=f"file://{tmp_path}/results",
            image_schemes=("http",),
            image_hosts=(http_server.host,),
            webhook_hosts=(http_server.host,),
            private_networks=("127.0.0.0/8",),
            lease_s=1,
            lost_after_s=3,
            visibility_timeout_s=6,
            retry_backoff_s=0.1,
            fetch_timeout_s=300,
            threads=THREADS,
            max_batch=4,
            shutdown_timeout_s=1,
        )
        yield Fleet(settings, tmp_path, package, answers, image, hook)


def check_every_job_has_ended_once(fleet: Fleet, received: list[tuple[str, bytes]]) -> None:
    """One final state each, the same for both clients, told to the receiver and sealed by its manifest."""
    documents = {one.id: one for one in fleet.documents()}
    assert {one.status for one in documents.values()} == {"succeeded"}
    assert len(documents) == len(fleet.ids)
    seen = fleet.previous("read", {"messages": [], "ids": fleet.ids})["documents"]
    for job_id, document in documents.items():
        assert seen[job_id]["status"] == "succeeded"
        assert (seen[job_id]["revision"], seen[job_id]["attempt"]) == (document.revision, document.attempt)
        assert (fleet.folder / "results" / job_id / "manifest.json").exists()

    def ends() -> Counter[tuple[str, int]]:
        events = [json.loads(body)["data"] for path, body in received if path == "/told"]
        return Counter(
            {(one["id"], one["revision"]): 1 for one in events if one["status"] in {"succeeded", "failed"}}
        )

    wait_for(lambda: len(ends()) >= len(documents), "the news of every end")
    assert ends() == Counter((one.id, one.revision) for one in documents.values())


@pytest.mark.parametrize(("killed", "heir"), [RELEASES, RELEASES[::-1]], ids=["upgrade", "rollback"])
def test_what_a_killed_worker_had_in_hand_is_done_by_one_of_the_other_release(
    fleet: Fleet, http_server: Any, gate: threading.Event, killed: str, heir: str
) -> None:
    for release in RELEASES:
        fleet.submit(release, *[{}] * THREADS)
    with fleet.worker(killed) as keeper:
        wait_for(lambda: len(fleet.in_hand()) > THREADS, "the start of jobs of both clients")
        [supervisor] = children(keeper.pid)
        for pid in (supervisor, *children(supervisor)):
            os.kill(pid, signal.SIGKILL)
        lost = fleet.in_hand()
    assert not fleet.all_final()
    gate.set()
    with fleet.worker(heir):
        wait_for(fleet.all_final, f"the end of all jobs, see {fleet.folder}")
        check_every_job_has_ended_once(fleet, http_server.received)
    assert {one.id for one in fleet.documents() if one.attempt > 1} == lost


def test_a_mixed_fleet_whose_workers_are_killed_ends_every_job_exactly_once(
    fleet: Fleet, http_server: Any, gate: threading.Event
) -> None:
    for release in RELEASES:
        fleet.submit(release, *[{"priority": priority} for priority in PRIORITIES * EACH])
        fleet.submit_for(Tenant("acme"), 2 * EACH)
        fleet.submit_for(Tenant("other", share=2), EACH // 2)
    with fleet.worker("previous") as one, fleet.worker("present") as other:
        for keeper in (one, other):
            wait_for(partial(fleet.works, keeper), "a job in the hands of each")
        for keeper in (one, other):
            wait_for(partial(fleet.works, keeper), "a job in the hands of whom to kill")
            os.kill(process(keeper), signal.SIGKILL)
            gate.set()
        wait_for(fleet.all_final, "the end of all jobs")
        check_every_job_has_ended_once(fleet, http_server.received)
    assert max(one.attempt for one in fleet.documents()) > 1, "no kill hit anything: nothing was tested"
    assert fleet.ledger.find_turn("normal") is None, "what the previous release took is not waited for"


def process(keeper: "subprocess.Popen[bytes]") -> int:
    """The worker process below a keeper and a supervisor; 0 where there is none just now."""
    return next((pid for supervisor in children(keeper.pid) for pid in children(supervisor)), 0)


WISHES: list[dict[str, Any]] = [
    *({"priority": priority} for priority in PRIORITIES),
    {"target": {"classes": ["n02123045", 3]}, "method": {"name": "layercam", "flip": True}},
    {"artifacts": [{"kind": "overlay", "format": "png"}, {"kind": "heatmap"}], "metrics": ["deletion"]},
    {"metadata": {"user": "é"}, "timeout_s": 9, "webhooks": []},
    {"expires_at": "2099-01-01T00:00:00Z"},
]


def test_what_either_release_submits_the_other_reads_as_it_was_meant(fleet: Fleet) -> None:
    asked = {release: fleet.submit(release, *WISHES) for release in RELEASES}
    with redis.Redis.from_url(fleet.settings.broker_url) as server:
        found = [
            (item, queue)
            for queue, number in publisher.ROUTES.values()
            for item in server.lrange(key(fleet, queue, number), 0, -1)
        ]
    assert len(found) == 2 * len(WISHES)
    understood = {}
    for item, queue in found:
        opened = envelope.parse_message(item, queue, fleet.settings.max_message_bytes, publisher.TASKS[queue])
        payload = json.loads(base64.b64decode(opened["body"]))[0][0]
        understood[payload["id"]] = Job.parse(payload)
    for one in [*asked["previous"], *asked["present"]]:
        assert understood[one["id"]] == Job.parse(one)
    packed = [(base64.b64encode(item).decode(), queue) for item, queue in found]
    seen = fleet.previous("read", {"messages": packed, "ids": fleet.ids})
    assert {one["id"]: Job.parse(one) for one in seen["jobs"]} == understood
    for document in fleet.documents():
        assert seen["documents"][document.id] == json.loads(document.to_json())


def key(fleet: Fleet, queue: str, number: int) -> str:
    return fleet.settings.key_prefix + queue + (f"{publisher.SEPARATOR}{number}" if number else "")


@pytest.mark.parametrize(("first", "second"), [RELEASES, RELEASES[::-1]])
def test_a_job_with_an_idempotency_key_is_one_job_whichever_client_repeats_it(
    fleet: Fleet, first: str, second: str
) -> None:
    [asked] = fleet.submit(first, {"idempotency_key": "once", "metadata": {"order": "é"}})
    assert fleet.hand_in(second, [{**asked, "id": new_id()}]) == [asked["id"]]
