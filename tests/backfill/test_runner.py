"""A backfill over doubles, with a worker that is a thread of the test's own."""

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Queue
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gradcam_worker.backfill import inflight, outages, output
from gradcam_worker.backfill.options import RunOptions
from gradcam_worker.backfill.output import DatasetDir
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.progress import Progress, describe_trouble
from gradcam_worker.backfill.registry import BackfillRecord, LeaseStatus
from gradcam_worker.backfill.runner import BackfillRunner
from gradcam_worker.backfill.sharding import cut_shards
from gradcam_worker.errors import (
    BackfillCanceled,
    BackfillConflict,
    BackfillImpossible,
    BackfillStopped,
    BrokerUnavailable,
    GradcamError,
    ImageNotFound,
    InvalidInput,
    LedgerUnavailable,
    StorageUnavailable,
)
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.operations.terminal import console
from gradcam_worker.operations.terminal.progress_bar import BackfillProgressBar
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.prefetch import Prefetcher
from gradcam_worker.schemas.annotations import Annotations
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, MemoryStore, fake_services

OUTPUT = "s3://results/photos"
IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()


class MemoryRegistry:
    """The registry in memory: see `gradcam_worker.backfill.registry.BackfillRegistry`."""

    def __init__(self) -> None:
        self.status = LeaseStatus(is_owner=True)
        self.record: BackfillRecord | None = None
        self.token = ""
        self.most = 0  # shards in flight that it was told of at once

    def renew(
        self,
        output: str,
        owner: str,
        facts: dict[str, Any],
        shards: Sequence[str],
        token: str,
        *,
        enter: bool = False,
    ) -> LeaseStatus:
        del output, owner
        before, self.record = self.record, BackfillRecord(facts, tuple(shards), is_running=True)
        self.most = max(self.most, len(shards))
        if not enter:
            return self.status
        goes_on = self.token and before is not None and before.facts["backfill"] == facts["backfill"]
        self.token = self.token if goes_on else token
        return replace(self.status, previous=before, token=self.token)

    def admits(self, shard: Shard) -> bool:
        return bool(self.token) and shard.token == self.token

    def release(self, output: str, owner: str, facts: dict[str, Any], shards: Sequence[str]) -> None:
        del output, owner
        self.record = BackfillRecord(facts, tuple(shards), is_running=False)

    def find(self, output: str) -> BackfillRecord | None:
        del output
        return self.record

    def request_cancel(self, output: str) -> BackfillRecord | None:
        del output
        self.status = replace(self.status, cancel_requested=True)
        return self.record


class Ledger(MemoryLedger):
    """One that can be away: as many questions as `away` says are not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.away = 0

    def _reach(self) -> None:
        if self.away:
            self.away -= 1
            message = "The ledger cannot be reached."
            raise LedgerUnavailable(message)

    def submit(self, job: Any, **options: Any) -> StatusDocument:
        self._reach()
        return super().submit(job, **options)

    def read_many(self, ids: Sequence[str], tenant: str | None = None) -> dict[str, StatusDocument]:
        self._reach()
        return super().read_many(ids, tenant)


@dataclass
class Harness:
    """An output, a ledger, a registry, and a worker that may be asked to misbehave."""

    images: dict[str, bytes | Exception]
    store: MemoryStore = field(default_factory=MemoryStore)
    ledger: Ledger = field(default_factory=Ledger)
    registry: MemoryRegistry = field(default_factory=MemoryRegistry)
    published: "Queue[str | None]" = field(default_factory=Queue)
    fails: dict[str, list[GradcamError]] = field(default_factory=dict)  # by shard key: of its next tries
    done: list[Shard] = field(default_factory=list)  # by the worker, in this order
    warnings: list[str] = field(default_factory=list)
    shown: list[Progress] = field(default_factory=list)
    on_progress: Callable[[Progress], object] = lambda _: None
    publish: Callable[[str], None] | None = None

    def work(self) -> None:
        """What a worker does, until it is told None."""
        worker = WorkerRef(id="w", device="cpu")
        leases = LeaseManager(self.ledger, "w", 15)
        breaker = CircuitBreaker(lambda: None)
        around = fake_services(self.images, store=self.store)
        handler = JobHandler(
            Settings(),
            self.ledger,
            around,
            worker,
            leases,
            breaker,
            admits=self.registry.admits,
        )
        while (job_id := self.published.get()) is not None:
            shard = self.ledger.read_job(job_id)
            if not isinstance(shard, Shard):
                continue  # it was cancelled before its turn
            self.done.append(shard)
            if wrong := self.fails.get(shard.key):
                claim = self.ledger.claim(self.ledger.read(job_id), worker)
                problem = Problem.of(wrong.pop(0), stage="load", attempt=1)
                self.ledger.finish(claim.document, status="failed", error=problem)
            else:
                handler.handle({"id": job_id}, job_id, kind=Shard)

    def run(self, plan: Plan, rows: Sequence[Row], **options: Any) -> dict[str, Any] | None:
        """One run, as `gradcam backfill` begins it."""
        dataset = DatasetDir(self.store)
        resume = options.pop("resume", False) or bool({"changed", "only_failed"} & options.keys())
        plan = dataset.resolve(plan, resume=resume, changed=options.get("changed", False))

        def show(progress: Progress) -> None:
            self.shown.append(progress)
            self.on_progress(progress)

        runner = BackfillRunner(
            plan,
            dataset,
            self.ledger,
            self.publish or self.published.put,
            self.registry,
            options=RunOptions(**options),
            on_progress=show,
            warn=self.warnings.append,
        )
        with runner.lease() as lease:
            return runner.run(lease, cut_shards(rows, plan))

    @property
    def summary(self) -> dict[str, Any] | None:
        return DatasetDir(self.store).read_summary()

    def rows(self) -> Counter[int]:
        """How often each row of the input is in the dataset."""
        files = [data for name, data in self.store.objects.items() if name.endswith(".parquet")]
        return Counter(
            number for one in files for number in pq.read_table(io.BytesIO(one))["row"].to_pylist()
        )

    def failed(self) -> list[dict[str, Any]]:
        """What `failed.jsonl` says."""
        return [json.loads(line) for line in self.store.objects["failed.jsonl"].splitlines()]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    for name in ("runner.MIN_POLL_INTERVAL_S", "runner.MAX_POLL_INTERVAL_S", "outages.RETRY_AFTER_S"):
        monkeypatch.setattr(f"gradcam_worker.backfill.{name}", 0.002)
    one = Harness({f"s3://in/{number}.png": IMAGE for number in range(100)})
    worker = threading.Thread(target=one.work)
    worker.start()
    yield one
    one.published.put(None)
    worker.join()


def images(count: int) -> list[Row]:
    return [Row(uri=f"s3://in/{number}.png", id=f"photo-{number}") for number in range(count)]


@pytest.fixture
def plan() -> Plan:
    return Plan(
        input="photos.csv", output=OUTPUT, network="efficientnet_lite0", target=Target(top_n=1), shard_rows=4
    )


def test_a_backfill_leaves_a_complete_dataset_with_each_row_exactly_once(
    harness: Harness, plan: Plan
) -> None:
    problem = Problem.of(ImageNotFound("No URI in line 3."), stage="plan", attempt=0)
    rows = [*images(9), Row(uri="s3://in/none.png", id="lost"), Row(uri="", problem=problem)]
    summary = harness.run(plan, rows)
    assert summary == harness.summary
    assert harness.rows() == dict.fromkeys(range(11), 1)
    assert summary is not None
    assert summary.items() >= {"schema": "gradcam.dataset/v1", "backfill": plan.id, "rows": 11}.items()
    assert summary.items() >= {"failed": 2, "codes": {"image_not_found": 2}, "shards": 3}.items()
    assert summary["network"] == {"name": "efficientnet_lite0", "layer": "blocks", "weights_sha256": None}
    assert [one["row"] for one in harness.failed()] == [9, 10]
    last = harness.shown[-1]
    assert (last.planned, last.done, last.failed, last.whole, last.in_flight) == (11, 11, 2, True, 0)
    assert next(reversed(harness.store.objects)) == "dataset.json", "it is written last"


def test_what_is_known_and_carried_is_in_the_dataset_and_what_cannot_be_used_is_told(
    harness: Harness, plan: Plan
) -> None:
    fields = {"annotated": True, "features": True, "carried": {"site": "string"}}
    labels = ["red", "purple", "red", "mauve", "red", "mauve"]
    rows = [
        row.model_copy(update={"annotations": Annotations(labels=[label]), "carried": (f"at {label}",)})
        for row, label in zip(images(6), labels, strict=True)
    ]
    assert harness.run(plan.model_copy(update=fields), rows)
    found = pa.concat_tables(
        pq.read_table(io.BytesIO(data)) for name, data in harness.store.objects.items() if "parquet" in name
    )
    assert found["site"].to_pylist() == [f"at {label}" for label in labels]
    assert found["truth_ids"].to_pylist() == [[0] if label == "red" else [] for label in labels]
    assert found["heat_features"].null_count == 0
    assert harness.shown[-1].warnings == {"label_unknown": 3}
    first, last = harness.warnings
    assert "label_unknown in shard 0: 2 of 4 rows. Row 1: There is no class 'purple'" in first
    assert last == "3 rows have the warning label_unknown."


def test_an_interrupted_backfill_goes_on_where_it_was(harness: Harness, plan: Plan) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done >= 8:
            raise KeyboardInterrupt

    harness.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan, images(40))
    assert harness.summary is None
    harness.on_progress = lambda _: None
    with pytest.raises(
        BackfillConflict, match=r"this very backfill, and \d+ shards of it are done: use --res"
    ):
        harness.run(plan, images(40))
    summary = harness.run(plan, images(40), resume=True)
    assert summary is not None
    assert harness.rows() == dict.fromkeys(range(40), 1)
    assert Counter(one.key for one in harness.done).most_common(1)[0][1] == 1, "no shard was run twice"
    assert harness.shown[-1].before >= 8
    count = len(harness.done)
    assert harness.run(plan, images(40), resume=True) == summary, "there is nothing left to do"
    assert len(harness.done) == count


def test_never_more_than_the_window_is_in_flight_and_others_get_their_share(
    harness: Harness, plan: Plan
) -> None:
    harness.run(plan, images(40), window=3)
    assert harness.registry.most == 3
    harness.registry.most, harness.registry.status = 0, LeaseStatus(is_owner=True, running=3)
    harness.store.objects.clear()
    harness.run(plan.model_copy(update={"id": "01a216d4-0523-773f-a799-60224947ae4d"}), images(40), window=3)
    assert harness.registry.most == 1


def test_without_a_window_there_are_as_many_as_keep_the_workers_busy(harness: Harness, plan: Plan) -> None:
    harness.ledger.health = {f"worker-{number}": "" for number in range(3)}
    kept: list[str] = []
    harness.publish = kept.append

    def interrupt(progress: Progress) -> None:
        if progress.in_flight == 12:  # 3 workers, 2 in hand, 2 for each of them
            raise KeyboardInterrupt

    harness.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan, images(100))
    assert len(kept) == 12


def test_no_more_is_handed_out_than_the_rate_allows(harness: Harness, plan: Plan) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done and len(harness.shown) > 20:
            raise KeyboardInterrupt

    harness.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan, images(40), rate=0.001)
    assert len(harness.done) == 1


def test_it_stops_early_where_too_many_rows_fail(harness: Harness, plan: Plan) -> None:
    harness.images.clear()
    with pytest.raises(BackfillStopped, match=r"rows have failed, more than 50%: image_not_found \d+\."):
        harness.run(plan, images(100), window=2)
    assert len(harness.done) < 10
    assert harness.summary is None
    for _ in range(2000):  # what the worker had in hand as it was cancelled comes to its end
        if harness.ledger.count_jobs() == (0, 0):
            break
        time.sleep(0.005)
    assert harness.ledger.count_jobs() == (0, 0), "nothing is left in flight"
    summary = harness.run(plan, images(100), resume=True, max_failed=1)
    assert summary is not None
    assert summary["failed"] == 100


def test_where_all_have_been_tried_there_is_nothing_to_stop(harness: Harness, plan: Plan) -> None:
    harness.images.clear()
    summary = harness.run(plan, images(16), window=4)
    assert summary is not None
    assert summary["codes"] == {"image_not_found": 16}


def test_what_no_worker_can_do_ends_it_at_once(harness: Harness, plan: Plan) -> None:
    nobody = plan.model_copy(update={"target": Target(classes=("purple",))})
    with pytest.raises(BackfillImpossible, match="because of unknown_class: There is no class 'purple'"):
        harness.run(nobody, images(100), window=2)
    assert len(harness.done) <= 3
    assert harness.run(plan, images(8)), "of that one nothing was done: the output is free"
    assert harness.rows() == dict.fromkeys(range(8), 1)


def test_a_shard_that_fails_as_a_whole_is_tried_again(harness: Harness, plan: Plan) -> None:
    keys = [one.key for one in cut_shards(images(12), plan)]
    harness.fails = {keys[1]: [StorageUnavailable("The store is down.")] * 2}
    assert harness.run(plan, images(12))
    assert [one.key for one in harness.done].count(keys[1]) == 3
    assert len({one.id for one in harness.done}) == 5


def test_without_that_shard_there_is_no_dataset_until_it_is_resumed(harness: Harness, plan: Plan) -> None:
    keys = [one.key for one in cut_shards(images(12), plan)]
    harness.fails = {keys[1]: [StorageUnavailable("The store is down.")] * 3}
    assert harness.run(plan, images(12)) is None
    assert harness.summary is None
    assert harness.warnings == [
        "Shard 1, rows 4 to 7, failed 3 times, at last with storage_unavailable: The store is down."
    ]
    assert (harness.shown[-1].lost, harness.shown[-1].codes) == (1, {"storage_unavailable": 4})
    assert harness.run(plan, images(12), resume=True)
    assert harness.rows() == dict.fromkeys(range(12), 1)


def test_a_changed_input_is_refused_or_what_has_changed_is_run_again(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(16))
    before = dict(harness.store.objects)
    rows = images(12)
    rows[5] = Row(uri="s3://in/99.png")
    with pytest.raises(BackfillConflict, match=r"shard 1, from row 4 on, is 00000001-.*--changed"):
        harness.run(plan, rows, resume=True)
    with pytest.raises(BackfillConflict, match=r"no part of the input.*--changed removes them"):
        harness.run(plan, images(12), resume=True)
    assert harness.store.objects == before, "nothing was touched"
    harness.done.clear()
    summary = harness.run(plan, rows, changed=True)
    assert [one.index for one in harness.done] == [1]
    assert harness.rows() == dict.fromkeys(range(12), 1)
    assert summary is not None
    assert (summary["rows"], summary["shards"]) == (12, 3)


def test_the_summary_is_removed_before_anything_changes(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(8))
    rows = [Row(uri="s3://in/99.png"), *images(8)[1:]]
    complete: list[bool] = []

    def publish(job_id: str) -> None:
        complete.append(harness.summary is not None)
        harness.published.put(job_id)

    harness.publish = publish
    harness.run(plan, rows, changed=True)
    assert complete == [False]


def test_only_shards_with_failed_rows_run_again_and_what_was_good_is_kept(
    harness: Harness, plan: Plan
) -> None:
    del harness.images["s3://in/5.png"], harness.images["s3://in/6.png"]
    assert harness.run(plan, images(16))
    for mended, left in ((5, 1), (6, 0)):
        harness.images[f"s3://in/{mended}.png"] = IMAGE
        harness.done.clear()
        summary = harness.run(plan, images(16), only_failed=True)
        assert [(one.index, one.keep) for one in harness.done] == [(1, True)]
        assert summary is not None
        assert summary["failed"] == left
        assert harness.rows() == dict.fromkeys(range(16), 1)
    assert "failed.jsonl" not in harness.store.objects
    harness.done.clear()
    assert harness.run(plan, images(16), only_failed=True) == harness.summary
    assert not harness.done


def test_a_ledger_that_is_away_is_waited_for_and_that_is_said(harness: Harness, plan: Plan) -> None:
    harness.ledger.away = 5
    assert harness.run(plan, images(40))
    assert harness.rows() == dict.fromkeys(range(40), 1)
    began, over = harness.warnings
    assert began == "The ledger cannot be reached. The backfill keeps trying."
    assert over.startswith("The ledger answers again, after ")


def test_of_a_long_outage_an_operator_hears_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr("gradcam_worker.resilience.outages.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gradcam_worker.backfill.outages.time.sleep", lambda _: None)
    log = outages.PatientCalls(said.append)

    def step() -> None:
        if now[0] < 70:
            message = "The ledger cannot be reached."
            raise LedgerUnavailable(message)

    for second in range(80):
        now[0] = float(second)
        log.call_ledger(step)
        assert log.unavailable == (second < 70)
    assert [text.removeprefix("The ledger cannot be reached. ") for text in said] == [
        "The backfill keeps trying.",
        "The backfill has kept trying for 30 s.",
        "The backfill has kept trying for 60 s.",
        "The ledger answers again, after 70 s.",
    ]


def test_a_broker_that_is_away_is_left_to_the_reaper(harness: Harness, plan: Plan) -> None:
    quiet = [True]

    def publish(job_id: str) -> None:
        if quiet[0]:
            message = "The broker cannot be reached."
            raise BrokerUnavailable(message)
        harness.published.put(job_id)

    def reap(progress: Progress) -> None:
        if quiet[0] and progress.in_flight == 4:
            quiet[0] = False
            for job_id in harness.ledger._entries:
                harness.published.put(job_id)

    harness.publish, harness.on_progress = publish, reap
    assert harness.run(plan, images(40), window=4)
    assert harness.rows() == dict.fromkeys(range(40), 1)
    began, over = harness.warnings
    assert began == "The broker cannot be reached. The backfill keeps trying."
    assert over.startswith("The broker answers again, after ")


def test_what_the_ledger_has_forgotten_is_submitted_again(harness: Harness, plan: Plan) -> None:
    forgotten: list[str] = []

    def publish(job_id: str) -> None:
        if forgotten:
            harness.published.put(job_id)
        else:
            forgotten.append(job_id)
            harness.ledger._entries.clear()

    harness.publish = publish
    assert harness.run(plan, images(4))
    assert [one.id for one in harness.done] == forgotten


def test_whoever_cancels_it_stops_what_is_in_flight(harness: Harness, plan: Plan) -> None:
    harness.publish = lambda _: None  # nobody works

    def cancel(progress: Progress) -> None:
        if progress.in_flight:
            harness.registry.request_cancel(OUTPUT)

    harness.on_progress = cancel
    with pytest.raises(BackfillCanceled, match=r"cancelled on request.*--resume"):
        harness.run(plan, images(40), window=3)
    states = Counter(entry.document.status for entry in harness.ledger._entries.values())
    assert states == {"canceled": 3}
    assert harness.registry.record is not None
    assert harness.registry.record.shards == ()
    harness.registry.status, harness.on_progress, harness.publish = (
        LeaseStatus(is_owner=True),
        lambda _: None,
        None,
    )
    assert harness.run(plan, images(40), resume=True)
    assert harness.rows() == dict.fromkeys(range(40), 1)


def test_it_ends_where_somebody_else_has_taken_the_output(harness: Harness, plan: Plan) -> None:
    def take(_: Progress) -> None:
        harness.registry.status = LeaseStatus(
            is_owner=False, previous=BackfillRecord({"pid": 7, "host": "gpu-2"}, shards=(), is_running=True)
        )

    harness.on_progress = take
    with pytest.raises(BackfillConflict, match="run by process 7 on gpu-2"):
        harness.run(plan, images(40))


def test_shards_at_another_layer_are_no_dataset_and_nobody_goes_on_with_them(
    harness: Harness, plan: Plan
) -> None:
    other = NetworkRef(name="efficientnet_lite0", layer="other", weights_sha256=None)
    harness.store.put("network.json", other.to_json().encode(), "application/json")
    with pytest.raises(BackfillStopped, match=r"do not agree: shard \d was explained with weights None"):
        harness.run(plan, images(40))
    assert harness.summary is None
    with pytest.raises(BackfillConflict, match=r"holds a dataset, and no backfill\.json"):
        harness.run(plan, images(40), resume=True)


def test_once_its_weights_are_known_no_worker_writes_with_others(harness: Harness, plan: Plan) -> None:
    other = NetworkRef(name="efficientnet_lite0", layer="blocks", weights_sha256="a" * 64)
    harness.store.put("network.json", other.to_json().encode(), "application/json")
    with pytest.raises(BackfillImpossible, match="because of weights_checksum_mismatch"):
        harness.run(plan, images(40))
    assert not [name for name in harness.store.objects if name.startswith("data/")]


def test_weights_of_shards_that_ended_while_nobody_looked_are_asked_of_the_ledger(
    harness: Harness, plan: Plan
) -> None:
    summary = harness.run(plan, images(8))
    assert summary is not None
    del harness.store.objects["network.json"], harness.store.objects["dataset.json"]
    again = harness.run(plan, images(8), resume=True)
    assert again is not None
    assert again["network"] == summary["network"]
    assert "network.json" in harness.store.objects


def test_whoever_has_lost_the_output_submits_nothing_more(harness: Harness, plan: Plan) -> None:
    def lose(_: str) -> None:
        harness.registry.status = LeaseStatus(
            is_owner=False, previous=BackfillRecord({"pid": 7, "host": "gpu-2"}, (), is_running=True)
        )

    harness.publish = lose
    with pytest.raises(BackfillConflict, match="run by process 7 on gpu-2"):
        harness.run(plan, images(40), window=4)
    assert len(harness.ledger._entries) == 1


def test_what_another_backfill_finishes_at_the_last_moment_is_its_own(harness: Harness, plan: Plan) -> None:
    theirs = plan.model_copy(update={"id": "01a216d4-0523-773f-a799-60224947ae4d", "target": Target(top_n=2)})
    stray = next(cut_shards(images(4), theirs))
    harness.store.put("backfill.json", theirs.to_json().encode(), "application/json")
    harness.ledger.submit(stray)
    harness.registry.record = BackfillRecord({"backfill": theirs.id}, (stray.id,), is_running=False)
    cancel = harness.ledger.cancel

    def late(job_id: str, tenant: str | None = None) -> StatusDocument:
        harness.store.put(f"data/{stray.key}.parquet", b"theirs", "")
        return cancel(job_id, tenant)

    harness.ledger.cancel = late  # type: ignore[method-assign]
    with pytest.raises(BackfillConflict, match="holds another backfill, of which a shard was done just now"):
        harness.run(plan, images(8))
    assert DatasetDir(harness.store).require_plan() == theirs
    assert not harness.done


def test_what_is_waited_for_before_it_begins_is_shown_and_can_be_cancelled(
    harness: Harness, plan: Plan
) -> None:
    other = "01a216d4-0523-773f-a799-60224947ae4d"
    stray = next(cut_shards(images(4), plan.model_copy(update={"id": other})))
    harness.ledger.claim(harness.ledger.submit(stray), WorkerRef(id="w", device="cpu"))
    harness.registry.record = BackfillRecord({"backfill": other}, (stray.id,), is_running=False)
    harness.on_progress = lambda _: harness.registry.request_cancel(OUTPUT) and None
    with pytest.raises(BackfillCanceled, match="cancelled on request"):
        harness.run(plan, images(8))
    assert harness.ledger.read(stray.id).cancel_requested_at


def test_what_is_cancelled_and_still_runs_is_remembered_as_in_flight(harness: Harness, plan: Plan) -> None:
    def claim(job_id: str) -> None:
        harness.ledger.claim(harness.ledger.read(job_id), WorkerRef(id="w", device="cpu"))
        harness.on_progress = cancel

    def cancel(_: Progress) -> None:
        harness.registry.request_cancel(OUTPUT)

    harness.publish = claim
    with pytest.raises(BackfillCanceled):
        harness.run(plan, images(8), window=1)
    (running,) = harness.ledger._entries
    assert harness.registry.record is not None
    assert harness.registry.record.shards == (running,)


def test_a_shard_that_succeeds_at_last_is_no_dead_letter(harness: Harness, plan: Plan) -> None:
    keys = [one.key for one in cut_shards(images(12), plan)]
    harness.fails = {keys[1]: [StorageUnavailable("The store is down.")] * 4}
    assert harness.run(plan, images(12)) is None
    assert len(harness.ledger.find_dead_letters()) == 3
    assert harness.run(plan, images(12), resume=True)
    assert not harness.ledger.find_dead_letters()


def test_why_a_shard_is_tried_again_is_said_once(harness: Harness, plan: Plan) -> None:
    worker, problem = (
        WorkerRef(id="w", device="cpu"),
        Problem.of(StorageUnavailable("Down."), stage="upload", attempt=1),
    )

    def put_off(job_id: str) -> None:
        claim = harness.ledger.claim(harness.ledger.read(job_id), worker)
        harness.ledger.postpone(claim.document, delay_s=0, error=problem, queued_at=utc_now())

    def interrupt(_: Progress) -> None:
        if len(harness.shown) > 5:
            raise KeyboardInterrupt

    harness.publish, harness.on_progress = put_off, interrupt
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan, images(12))
    assert harness.warnings == ["A shard waits for its next attempt, because of storage_unavailable: Down."]


def test_what_is_not_named_as_a_shard_is_none(harness: Harness, plan: Plan) -> None:
    first, *_ = cut_shards(images(8), plan)
    for name in (f"data/{first.key}.parquet.crc", "data/2031-report.csv", "data/_SUCCESS"):
        harness.store.put(name, b"", "")
    assert harness.run(plan, images(8))
    assert harness.rows() == dict.fromkeys(range(8), 1)


def test_a_table_that_is_no_shards_would_be_read_with_them_and_is_refused(
    harness: Harness, plan: Plan
) -> None:
    harness.store.put("data/mine.parquet", b"", "")
    with pytest.raises(BackfillConflict, match=r"holds mine\.parquet, which no backfill"):
        harness.run(plan, images(8))
    assert not harness.done
    del harness.store.objects["data/mine.parquet"]
    harness.on_progress = lambda _: harness.store.put("data/mine.parquet", b"", "") and None
    with pytest.raises(BackfillConflict, match=r"holds mine\.parquet, which no backfill"):
        harness.run(plan, images(8))
    assert harness.summary is None


def test_a_shard_that_an_older_version_left_in_flight_is_refused_and_submitted_again(
    harness: Harness, plan: Plan
) -> None:
    plan = DatasetDir(harness.store).resolve(plan, resume=False, changed=False)
    DatasetDir(harness.store).claim(plan)
    first, _ = cut_shards(images(8), plan)
    harness.ledger.submit(first)
    harness.registry.record = BackfillRecord({"backfill": plan.id}, (first.id,), is_running=False)
    assert harness.run(plan, images(8), resume=True)
    refused = harness.ledger.read(first.id)
    assert (refused.status, refused.error and refused.error.code) == ("failed", "unknown_backfill")
    assert not harness.ledger.find_dead_letters(), "it has succeeded since"


def test_what_an_earlier_run_left_in_flight_ends_before_the_summary_is_written(
    harness: Harness, plan: Plan
) -> None:
    stray = next(cut_shards(images(4), plan)).model_copy(
        update={"id": "01a216d4-0523-773f-a799-60224947ae4d"}
    )
    harness.ledger.submit(stray)
    harness.registry.record = BackfillRecord({"backfill": plan.id}, (stray.id,), is_running=False)
    assert harness.run(plan, images(8))
    assert harness.ledger.read(stray.id).status == "canceled"


def test_what_succeeded_and_lies_there_is_not_run_again_and_what_does_not_lie_there_is(
    harness: Harness, plan: Plan
) -> None:
    assert harness.run(plan, images(8))
    first = next(name for name in harness.store.objects if name.startswith("data/"))
    harness.done.clear()
    del harness.store.objects[first]
    assert harness.run(plan, images(8), resume=True)
    assert [one.index for one in harness.done] == [0]
    assert harness.rows() == dict.fromkeys(range(8), 1)


def test_an_input_without_rows_and_one_that_breaks_off_are_told(harness: Harness, plan: Plan) -> None:
    with pytest.raises(InvalidInput, match=r"photos\.csv holds no rows"):
        harness.run(plan, [])

    def broken() -> Iterator[Row]:
        yield from images(6)
        message = "Line 7 is not UTF-8."
        raise InvalidInput(message)

    with pytest.raises(InvalidInput, match="Line 7"):
        harness.run(plan, broken())  # type: ignore[arg-type]
    assert harness.summary is None


def test_an_output_that_is_somebody_elses_is_refused(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(4))
    dataset = DatasetDir(harness.store)
    own = {"id": "01a216d4-0523-773f-a799-60224947ae4d"}
    wider = plan.model_copy(update={**own, "target": Target(top_n=2)})
    with pytest.raises(BackfillConflict, match=r"holds another backfill\. Its target is .*\. Choose another"):
        dataset.resolve(wider, resume=True, changed=True)
    heavier = plan.model_copy(update={**own, "weights_sha256": "a" * 64})
    with pytest.raises(BackfillConflict, match=r"Its weights_sha256 is any.*--changed"):
        dataset.resolve(heavier, resume=True, changed=False)
    assert dataset.resolve(heavier, resume=True, changed=True).id == plan.id
    moved = plan.model_copy(update={**own, "input": "elsewhere.csv"})
    with pytest.raises(BackfillConflict, match="Its input is"):
        dataset.resolve(moved, resume=False, changed=False)
    assert dataset.resolve(moved, resume=True, changed=False).id == plan.id
    with pytest.raises(BackfillConflict, match="of which a shard was done just now"):
        dataset.claim(moved)
    harness.store.objects["backfill.json"] = b"{}"
    with pytest.raises(BackfillConflict, match="no plan that this version can read"):
        dataset.resolve(plan, resume=True, changed=False)
    del harness.store.objects["backfill.json"]
    with pytest.raises(BackfillConflict, match=r"holds a dataset, and no backfill\.json"):
        dataset.resolve(plan, resume=True, changed=False)


def test_other_weights_run_everything_again(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(8))
    dataset = DatasetDir(harness.store)
    dataset.claim(dataset.resolve(plan, resume=True, changed=False))
    assert dataset.read_network() is not None
    heavier = dataset.resolve(plan.model_copy(update={"weights_sha256": "a" * 64}), resume=True, changed=True)
    dataset.claim(heavier)
    assert dataset.read_network() is None
    assert dataset.require_plan() == heavier
    assert not {one.key for one in cut_shards(images(8), heavier)} & {
        key for keys in dataset.done_keys().values() for key in keys
    }


def test_many_failed_rows_are_written_in_parts(
    harness: Harness, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MAX_FAILED_FILE_BYTES", 1500)
    for number in range(12):
        del harness.images[f"s3://in/{number}.png"]
    summary = harness.run(plan, images(16), max_failed=1)
    assert summary is not None
    assert summary["failed_files"] == ["failed.jsonl", "failed-2.jsonl", "failed-3.jsonl"]
    lines = b"".join(harness.store.objects[name] for name in summary["failed_files"]).splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(12))
    for number in range(8):
        harness.images[f"s3://in/{number}.png"] = IMAGE
    summary = harness.run(plan, images(16), only_failed=True)
    assert summary is not None
    assert summary["failed_files"] == ["failed.jsonl"]
    assert not {"failed-2.jsonl", "failed-3.jsonl"} & harness.store.objects.keys()


def test_a_file_that_has_gone_is_missed_before_the_summary_is_written(harness: Harness, plan: Plan) -> None:
    def lose(progress: Progress) -> None:
        if progress.whole and not progress.in_flight:
            first = next(name for name in harness.store.objects if name.startswith("data/"))
            del harness.store.objects[first]
            harness.on_progress = lambda _: None

    harness.on_progress = lose
    with pytest.raises(BackfillConflict, match=r"1 shard is done and not there: 0000000.*--resume"):
        harness.run(plan, images(8))
    assert harness.summary is None


def test_shown_is_what_is_known() -> None:
    begun = Progress(planned=1024, done=512, partly=16, before=256, in_flight=2, workers=0, rows_per_s=98.0)
    unknown = BackfillProgressBar("lines")
    assert unknown.text(begun) == (
        "784 of at least 1,024 rows · 98 rows/s · 2 shards in flight"
        " · no worker is alive: start one with `gradcam worker`"
    )
    about = BackfillProgressBar("lines", lambda: 9996)
    failing = replace(begun, failed=7, workers=1)
    assert about.text(failing) == (
        "784 of about 9,996 rows · 7 failed · 98 rows/s · 0:01:34 left · 2 shards in flight"
    )
    assert about.facts(begun).items() >= {"total": 9996, "left_s": 94, "rows_per_s": 98.0}.items()
    assert about.text(replace(begun, whole=True, workers=None)).startswith("784 of 1,024 rows · ")
    assert unknown.text(Progress(workers=0)).startswith("No rows yet · no worker is alive")
    assert about.text(replace(failing, trouble="no worker takes work: a\nb")).endswith("takes work: a\\nb")


def test_workers_that_take_no_work_are_told_once_and_shown_with_the_reason(
    harness: Harness, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker of another version says of its health is no trouble."""
    told = {"a": '{"trouble": "The storage has failed."}', "b": '{"trouble": null}', "c": "later"}
    monkeypatch.setattr(harness.ledger, "find_workers", lambda: told)
    assert harness.run(plan, images(4))
    assert {one.trouble for one in harness.shown} == {"1 of 3 workers takes no work: The storage has failed"}
    assert harness.warnings == ["1 of 3 workers takes no work: The storage has failed."]
    del told["b"], told["c"]
    assert describe_trouble(told.values()) == "no worker takes work: The storage has failed"
    assert describe_trouble([]) is None


@pytest.mark.parametrize("form", ["terminal", "lines", "json"])
def test_how_far_it_is_is_shown_whoever_looks(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "terminal":
        monkeypatch.setattr(
            console, "err", Console(stderr=True, force_terminal=True, width=100, highlight=False)
        )
    with BackfillProgressBar(form) as progress:
        progress.show(Progress(planned=1024, done=512))
        progress.show(Progress(planned=2048, done=999))
        progress.note("something \x1b[31m")
    out, err = capsys.readouterr()
    said = out if form == "json" else err
    assert ('"done": 512' if form == "json" else "512 of at least 1,024 rows") in said
    assert "something \\x1b[31m" in err
    if form == "json":
        assert [json.loads(line)["event"] for line in out.splitlines()] == ["progress"], "not too often"


def test_reading_ahead_waits_for_whoever_takes_and_passes_errors_on() -> None:
    given: list[int] = []

    def source() -> Iterator[int]:
        for number in range(9):
            given.append(number)
            yield number
        message = "broken"
        raise OSError(message)

    with Prefetcher(source(), max_ahead=2) as prefetched:
        assert prefetched.next(9) == 0
        assert max(given) <= 3
        assert [prefetched.next(9) for _ in range(8)] == list(range(1, 9))
        with pytest.raises(OSError, match="broken"):
            prefetched.next(9)
    gate = threading.Event()
    with Prefetcher(number for number in range(1) if gate.wait(9)) as slow:
        assert slow.next(0.001) is None
        assert not slow.ended
        gate.set()
        assert slow.next(9) == 0
        assert slow.next(9) is None
        assert slow.ended


def test_the_names_of_what_stops_everything_are_codes_of_errors() -> None:
    assert {one.code for one in descendants(GradcamError)} >= inflight.FATAL_CODES


def descendants(kind: type[GradcamError]) -> set[type[GradcamError]]:
    return {kind, *(one for below in kind.__subclasses__() for one in descendants(below))}
