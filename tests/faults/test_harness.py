"""The harness sees what it is there to see: each of these would be a broken promise, made by hand."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from devtools.faults import campaign
from devtools.faults.observer import JobObserver
from devtools.faults.verdict import PROMISES, Verdict

WAIT_S = 20
ONE = "00000000-0000-4000-8000-000000000001"
TWO = "00000000-0000-4000-8000-000000000002"


class Scene:
    """As much of a cluster as an observer looks at, and a hand that writes there."""

    def __init__(self, folder: Path, url: str, prefix: str) -> None:
        self.url, self.bucket = url, folder / "results"
        self.settings = SimpleNamespace(key_prefix=prefix)
        self.accepted: dict[str, float] = {ONE: 0.0}
        self.unexpected: list[str] = []

    def manifest(self, job_id: str) -> Path:
        return self.bucket / "cams" / job_id / "manifest.json"

    @property
    def ledger(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def write(self, status: str, job_id: str = ONE, route: str = "normal", **fields: Any) -> None:
        document = {"status": status, "attempt": 1, "error": None, "worker": {"id": "vm:7"}, **fields}
        with self.ledger as server:
            key = f"{self.settings.key_prefix}job:{job_id}"
            server.hset(key, mapping={"route": route, "document": json.dumps(document)})
            server.expire(key, 600)

    def store(self, name: str, data: bytes) -> dict[str, Any]:
        path = self.bucket / "cams" / ONE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        uri = f"s3://results/cams/{ONE}/{name}"
        return {"uri": uri, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def seal(self, *records: dict[str, Any], note: str = "") -> dict[str, Any]:
        manifest = {"artifacts": records, "explanations": [], "note": note}
        written = self.store("manifest.json", json.dumps(manifest).encode())
        return {"result": {"manifest_sha256": written["sha256"]}}


@pytest.fixture
def scene(tmp_path: Path, valkey: str, request: pytest.FixtureRequest) -> Scene:
    return Scene(tmp_path, valkey, f"{request.node.name}:")


@pytest.fixture
def observer(scene: Any) -> Iterator[JobObserver]:
    with JobObserver(scene) as observer:
        yield observer


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_job_that_went_well_breaks_nothing(scene: Scene, observer: JobObserver) -> None:
    scene.write("succeeded", **scene.seal(scene.store("heatmaps.npz", b"warm")))
    wait_for(lambda: observer.manifests and not observer.unfinished())
    assert observer.verdict(faults=0).kept


def test_a_job_that_the_ledger_does_not_know_is_lost(scene: Scene, observer: JobObserver) -> None:
    assert observer.verdict(faults=0).lost == 1


def test_a_job_that_runs_for_ever_has_no_final_state(scene: Scene, observer: JobObserver) -> None:
    scene.write("running")
    assert observer.drain(0.2) >= 0.2
    assert observer.verdict(faults=0).without_final_state == 1


def test_a_final_document_that_changes_is_doubled(scene: Scene, observer: JobObserver) -> None:
    scene.write("canceled", error={"code": "canceled"})
    wait_for(lambda: not observer.unfinished())
    scene.write("failed", error={"code": "timeout"})
    wait_for(lambda: observer.changed)
    assert observer.verdict(faults=0, expected=lambda _: {"timeout"}).doubled == 1


def test_a_manifest_with_two_contents_is_doubled(scene: Scene, observer: JobObserver) -> None:
    record = scene.store("heatmaps.npz", b"warm")
    scene.seal(record)
    wait_for(lambda: observer.manifests)
    scene.write("succeeded", **scene.seal(record, note="another attempt"))
    wait_for(lambda: len(observer.manifests[ONE]) > 1)
    assert observer.verdict(faults=0).doubled == 1


@pytest.mark.parametrize("data", [b"", b"war", b"cold"])
def test_a_manifest_before_what_it_names_is_early(scene: Scene, observer: JobObserver, data: bytes) -> None:
    record = scene.store("heatmaps.npz", b"warm")
    scene.store("heatmaps.npz", data)
    scene.seal(record)
    wait_for(lambda: observer.early)
    assert observer.verdict(faults=0).early_manifests == 1


def test_success_without_its_manifest_is_a_broken_promise(scene: Scene, observer: JobObserver) -> None:
    scene.write("succeeded", result={"manifest_sha256": "0" * 64})
    assert "without the manifest" in str(observer.verdict(faults=0).broken)


@pytest.mark.parametrize("error", [None, {"code": "internal"}, {"code": "made_up"}])
def test_an_end_without_a_code_of_the_contract_is_untyped(
    scene: Scene, observer: JobObserver, error: Any
) -> None:
    scene.write("failed", error=error)
    assert observer.verdict(faults=0, expected=lambda _: {"internal", "none", "made_up"}).untyped == 1


def test_an_end_that_a_job_does_not_deserve_is_a_broken_promise(scene: Scene, observer: JobObserver) -> None:
    scene.write("failed", error={"code": "image_not_found"})
    assert "1 image_not_found" in str(observer.verdict(faults=0).broken)


def test_recovery_is_measured_until_the_next_attempt(scene: Scene, observer: JobObserver) -> None:
    scene.accepted[TWO] = 0.0
    scene.write("running")
    scene.write("running", TWO, worker={"id": "vm:8"})
    wait_for(lambda: len(observer.running) == 2)
    assert observer.hit(7) == 1, "the other one runs elsewhere"
    time.sleep(0.2)
    scene.write("queued")
    wait_for(lambda: observer.requeued)
    scene.write("running", attempt=2)
    wait_for(lambda: observer.recoveries)
    [seconds] = observer.recoveries["normal"]
    assert 0.2 <= observer.requeued[0] <= seconds < WAIT_S
    assert observer.verdict(faults=1).recovery_s_max == seconds


def test_what_comes_after_others_is_requeued_in_time_but_may_wait(
    scene: Scene, observer: JobObserver
) -> None:
    scene.write("running", route="bulk")
    wait_for(lambda: observer.running)
    observer.hit()
    scene.write("queued", route="bulk")
    wait_for(lambda: observer.requeued)
    time.sleep(0.3)
    scene.write("running", route="bulk", attempt=2)
    wait_for(lambda: observer.recoveries)
    assert observer.verdict(faults=1).recovery_s_max < observer.recoveries["bulk"][0] - 0.2


@pytest.mark.parametrize("promise", PROMISES)
def test_each_count_is_a_promise(promise: str) -> None:
    assert Verdict().kept
    broken: dict[str, Any] = {promise: 1}
    assert not Verdict(**broken).kept


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An attack whose outcome a test decides."""
    module = SimpleNamespace(found=Verdict(jobs=2), asked=[])

    def attack(count: int, seed: int) -> Verdict:
        module.asked.append((count, seed))
        if isinstance(module.found, Exception):
            raise module.found
        assert isinstance(module.found, Verdict)
        return module.found

    module.attack = attack
    monkeypatch.setitem(campaign.ATTACKS, "kill", campaign.Attack(3, 9, "kills"))
    monkeypatch.setattr(campaign, "import_module", {"devtools.faults.kill": module}.__getitem__)
    return module


def test_all_kept_is_exit_code_0_and_the_short_form_is_the_default(
    attack: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign.main(["kill", "--json", "--seed", "5"]) == 0
    found = json.loads(capsys.readouterr().out)["attacks"][0]
    assert attack.asked == [(3, 5)]
    assert found.keys() >= {"attack", "jobs", "faults", *PROMISES, "recovery_s_max", "seconds", "kept"}


def test_the_full_form_is_longer(attack: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign.main(["kill", "--full"]) == 0
    assert attack.asked == [(9, 0)]
    assert "kill" in capsys.readouterr().out


def test_one_broken_promise_is_exit_code_1(
    attack: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    attack.found = Verdict(jobs=2, lost=1, broken=["A job was lost."])
    assert campaign.main(["kill"]) == 1
    assert "kill: A job was lost." in capsys.readouterr().out


def test_an_attack_that_does_not_come_to_its_end_has_kept_nothing(
    attack: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    attack.found = TimeoutError("the worker never took a job")
    assert campaign.main(["kill"]) == 1
    assert "the worker never took a job" in capsys.readouterr().out


def test_an_attack_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        campaign.main(["kil"])
    assert "there is no attack kil" in capsys.readouterr().err
