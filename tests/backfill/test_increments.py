"""What is computed where a list has changed, or names a picture twice: each row once, found by what it is."""

import contextlib
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradcam_worker.artifacts.merged_files import size_of_records
from gradcam_worker.backfill.compaction import Compactor
from gradcam_worker.backfill.output import DatasetDir
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.progress import Progress
from gradcam_worker.backfill.reuse import DoneRows, read_done_rows
from gradcam_worker.backfill.sharding import cut_shards
from gradcam_worker.errors import BackfillConflict, StorageUnavailable
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.testing import MemoryStore
from tests.backfill.test_runner import OUTPUT, Harness, images


class Counted(dict[str, Any]):
    """Images that count how often each was fetched."""

    def __init__(self, count: int) -> None:
        super().__init__({uri(number): drawn(number) for number in range(count)})
        self.fetched: Counter[str] = Counter()

    def get(self, key: str, default: Any = None) -> Any:
        self.fetched[key] += 1
        return super().get(key, default)


def uri(number: int) -> str:
    return f"s3://in/{number}.png"


def drawn(number: int) -> bytes:
    pixels = np.full((20, 24, 3), 40, np.uint8)
    pixels[:8, number % 16 : number % 16 + 8] = (7 * number % 256, 255 - 5 * number % 200, 13 * number % 256)
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    for name in ("runner.MIN_POLL_INTERVAL_S", "runner.MAX_POLL_INTERVAL_S", "outages.RETRY_AFTER_S"):
        monkeypatch.setattr(f"gradcam_worker.backfill.{name}", 0.002)
    one = Harness(Counted(100))
    worker = threading.Thread(target=one.work)
    worker.start()
    yield one
    one.published.put(None)
    worker.join()


@pytest.fixture
def plan() -> Plan:
    return Plan(
        input="photos.csv", output=OUTPUT, network="efficientnet_lite0", target=Target(top_n=2), shard_rows=4
    )


def fetched(harness: Harness) -> "Counter[str]":
    """What was fetched since this was last asked."""
    assert isinstance(harness.images, Counted)
    found, harness.images.fetched = harness.images.fetched, Counter()
    return found


def table(store: MemoryStore) -> pa.Table:
    """The dataset, in the order of its rows."""
    files = [
        pq.read_table(io.BytesIO(data)).replace_schema_metadata(None)
        for name, data in [*store.objects.items()]
        if name.startswith("data/")
    ]
    order: Any = [("row", "ascending"), ("index", "ascending")]
    return pa.concat_tables(files).sort_by(order)


def from_scratch(harness: Harness, plan: Plan, rows: list[Row]) -> pa.Table:
    """The dataset that a backfill of these rows would leave in an empty output."""
    kept, harness.store.objects = harness.store.objects, {}
    harness.run(Plan.model_validate({**plan.model_dump(exclude={"id"}), "shard_rows": 16}), rows)
    fresh, harness.store.objects = table(harness.store), kept
    fetched(harness)
    return fresh


def test_one_row_in_front_computes_one_image_and_all_others_move(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(30))
    fetched(harness)
    rows = [Row(uri=uri(77), id="new"), *images(30)]
    summary = harness.run(plan, rows, changed=True)
    assert fetched(harness) == {uri(77): 1}
    assert summary is not None
    assert (summary["rows"], summary["shards"], summary["files"]) == (31, 8, 8)
    assert harness.shown[-1].reused == 30
    assert table(harness.store).equals(from_scratch(harness, plan, rows))


def test_one_in_front_one_removed_and_one_replaced(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(30))
    fetched(harness)
    rows = [Row(uri=uri(77)), *images(30)]
    rows[12] = Row(uri=uri(11), version="2")
    del rows[20]
    harness.run(plan, rows, changed=True)
    assert fetched(harness) == {uri(77): 1, uri(11): 1}
    assert table(harness.store).equals(from_scratch(harness, plan, rows))


def test_only_what_a_result_depends_on_makes_a_row_another(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(8))
    fetched(harness)
    rows = [row.model_copy(update={"id": f"renamed-{number}"}) for number, row in enumerate(images(8))]
    rows[3] = rows[3].model_copy(update={"version": "etag-2"})
    rows[5] = rows[5].model_copy(update={"classes": ("tiny class 5",)})
    digests = [digest for shard in cut_shards(rows, plan) for digest in shard.row_digests()]
    before = [digest for shard in cut_shards(images(8), plan) for digest in shard.row_digests()]
    assert [place for place in range(8) if digests[place] != before[place]] == [3, 5]
    rows[5] = rows[5].model_copy(update={"classes": None})
    harness.run(plan, rows, changed=True)
    assert fetched(harness) == {uri(3): 1}
    assert table(harness.store)["id"].to_pylist()[::2] == [f"renamed-{number}" for number in range(8)]


@pytest.mark.parametrize("killed_after", [1, 5, 9])
def test_a_kill_in_the_middle_loses_nothing_and_nothing_is_computed_twice(
    harness: Harness, plan: Plan, killed_after: int
) -> None:
    harness.run(plan, images(40))
    fetched(harness)
    rows = [Row(uri=uri(90)), *images(40)[:20], Row(uri=uri(91)), *images(40)[20:], Row(uri=uri(92))]

    def interrupt(progress: Progress) -> None:
        if len(harness.done) >= 10 + killed_after:
            raise KeyboardInterrupt

    harness.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan, rows, changed=True, window=2)
    assert harness.summary is None
    present = set(table(harness.store)["uri"].to_pylist())
    assert present >= {uri(number) for number in range(40)}, "old rows are there until all new ones are"
    harness.on_progress = lambda _: None
    assert harness.run(plan, rows, changed=True)
    assert fetched(harness) == {uri(90): 1, uri(91): 1, uri(92): 1}
    assert table(harness.store).equals(from_scratch(harness, plan, rows))


def test_a_kill_while_outdated_files_are_removed_is_gone_on_with(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(20))
    fetched(harness)
    rows, remove, removed = [Row(uri=uri(90)), *images(20)], harness.store.remove, [0]

    def killed(key: str) -> None:
        removed[0] += key.startswith("data/")
        if removed[0] > 2:
            message = "The store is down."
            raise StorageUnavailable(message)
        remove(key)

    harness.store.remove = killed  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailable):
        harness.run(plan, rows, changed=True)
    harness.store.remove = remove  # type: ignore[method-assign]
    assert harness.summary is None
    assert harness.run(plan, rows, changed=True)
    assert fetched(harness) == {uri(90): 1}
    assert harness.rows() == dict.fromkeys(range(21), 2)


def test_a_picture_that_is_listed_twice_is_computed_once_also_across_shards(
    harness: Harness, plan: Plan
) -> None:
    rows = [Row(uri=uri(number % 5), id=str(place)) for place, number in enumerate(range(30))]
    assert harness.run(plan, rows, window=8)
    assert fetched(harness) == {uri(number): 1 for number in range(5)}
    assert harness.rows() == dict.fromkeys(range(30), 2)
    one = table(harness.store)
    assert one["id"].to_pylist()[::2] == [str(place) for place in range(30)]
    assert one["probability"].to_pylist()[:10] == one["probability"].to_pylist()[50:]


def test_a_shard_waits_for_the_one_that_holds_its_rows_and_for_no_other(harness: Harness, plan: Plan) -> None:
    published: list[str] = []

    def publish(job_id: str) -> None:
        published.append(job_id)
        if len(published) == 3:
            begun = [harness.ledger.read_job(one) for one in published]
            assert [one.index for one in begun if isinstance(one, Shard)] == [0, 1, 3]
        for one in published[-1 if len(published) > 3 else -3 :] if len(published) >= 3 else ():
            harness.published.put(one)

    harness.publish = publish
    rows = [*images(8), images(1)[0].model_copy(update={"id": "again"}), *images(16)[9:16]]
    assert harness.run(plan, rows, window=8)
    assert fetched(harness)[uri(0)] == 1
    assert harness.rows() == dict.fromkeys(range(16), 2)


def test_where_the_first_of_two_fails_as_a_whole_the_other_is_computed(harness: Harness, plan: Plan) -> None:
    rows = [*images(4), *(row.model_copy(update={"id": None}) for row in images(4))]
    first, second = cut_shards(rows, plan)
    harness.fails = {first.key: [StorageUnavailable("The store is down.")] * 3}
    assert harness.run(plan, rows) is None
    assert [name for name in harness.store.objects if second.key in name]
    assert harness.run(plan, rows, resume=True)
    assert harness.rows() == dict.fromkeys(range(8), 2)


def test_a_shard_is_tried_again_while_as_many_wait_for_it_as_may_be_in_flight(
    harness: Harness, plan: Plan
) -> None:
    rows = [Row(uri=uri(number % 4), id=str(place)) for place, number in enumerate(range(16))]
    harness.fails = {next(iter(cut_shards(rows, plan))).key: [StorageUnavailable("The store is down.")]}
    assert harness.run(plan, rows, window=2)
    assert fetched(harness) == {uri(number): 1 for number in range(4)}


def test_a_dataset_without_digests_is_computed_again_where_it_has_moved(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(8))
    for name, data in harness.store.objects.items():
        if name.startswith("data/"):
            file = io.BytesIO()
            pq.write_table(pq.read_table(io.BytesIO(data)).drop_columns(["row_digest"]), file)
            harness.store.objects[name] = file.getvalue()
    fetched(harness)
    assert harness.run(plan, [*images(4), Row(uri=uri(50)), *images(8)[4:]], changed=True)
    assert fetched(harness).keys() == {uri(number) for number in (50, 4, 5, 6, 7)}
    assert harness.rows() == dict.fromkeys(range(9), 2)


def test_rows_of_other_weights_are_not_taken_over(harness: Harness, plan: Plan) -> None:
    harness.run(plan, images(8))
    for name, data in harness.store.objects.items():
        if name.startswith("data/"):
            one = pq.read_table(io.BytesIO(data))
            facts = json.loads((one.schema.metadata or {})[b"gradcam"])
            facts["network"]["weights_sha256"] = "a" * 64
            file = io.BytesIO()
            pq.write_table(one.replace_schema_metadata({"gradcam": json.dumps(facts)}), file)
            harness.store.objects[name] = file.getvalue()
    fetched(harness)
    assert harness.run(plan, [Row(uri=uri(50)), *images(8)], changed=True)
    assert sum(fetched(harness).values()) == 9


def test_rows_that_failed_are_tried_again_where_their_shard_is_written_anew(
    harness: Harness, plan: Plan
) -> None:
    gone = harness.images.pop(uri(6))
    assert harness.run(plan, images(12))
    harness.images[uri(6)] = gone
    fetched(harness)
    summary = harness.run(plan, [Row(uri=uri(50)), *images(12)], changed=True)
    assert summary is not None
    assert summary["failed"] == 0
    assert fetched(harness) == {uri(50): 1, uri(6): 1}


def test_the_index_of_a_dataset_takes_twelve_bytes_a_row() -> None:
    rng = np.random.default_rng(3)
    digests = rng.integers(0, 2**63, 10_000, np.uint64)
    done = DoneRows((f"file-{number}", digests[100 * number :][:100]) for number in range(100))
    assert done._digests.nbytes + done._numbers.nbytes == 12 * len(done) == 120_000
    wanted = [f"{digests[place]:016x}" for place in (0, 99, 100, 9999)]
    assert done.find([*wanted, None, "0" * 16]) == ["file-0", "file-0", "file-1", "file-99", None, None]
    assert DoneRows(()).find(["0" * 16]) == [None]


class TestCompaction:
    """Many files become few, and everything else goes on as before."""

    @staticmethod
    def compact(harness: Harness, target_bytes: int | None = None) -> Any:
        """Merge about four shards into a file."""
        sizes = [
            size_of_records(data) for name, data in harness.store.objects.items() if name.startswith("data/0")
        ]
        return Compactor(DatasetDir(harness.store), target_bytes=target_bytes or 4 * sizes[0]).run()

    @pytest.fixture
    def complete(self, harness: Harness, plan: Plan) -> Harness:
        gone = harness.images.pop(uri(6))
        harness.run(plan, images(40))
        harness.images[uri(6)] = gone
        fetched(harness)
        return harness

    def test_the_rows_are_the_same_in_fewer_files(self, complete: Harness, plan: Plan) -> None:
        before, summary = table(complete.store), complete.summary
        merged = self.compact(complete)
        assert summary is not None
        assert merged.files_before == 10
        assert 1 < merged.files < 5
        after = complete.summary
        assert after is not None
        assert after.pop("compacted_at")
        assert after == {**summary, "files": merged.files}
        assert table(complete.store).equals(before)
        assert "compacting.json" not in complete.store.objects
        again = self.compact(complete)
        assert (again.files_before, again.files) == (merged.files, merged.files)

    def test_nothing_is_left_to_do_afterwards(self, complete: Harness, plan: Plan) -> None:
        self.compact(complete)
        objects = dict(complete.store.objects)
        assert complete.run(plan, images(40), resume=True) == complete.summary
        assert complete.store.objects == objects
        assert not fetched(complete)

    def test_failed_rows_are_run_again_and_only_they(self, complete: Harness, plan: Plan) -> None:
        self.compact(complete)
        summary = complete.run(plan, images(40), only_failed=True)
        assert fetched(complete) == {uri(6): 1}
        assert summary is not None
        assert (summary["failed"], summary["shards"]) == (0, 10)
        assert table(complete.store).equals(from_scratch(complete, plan, images(40)))
        merged = self.compact(complete)
        assert merged.files < summary["files"]
        assert complete.rows() == dict.fromkeys(range(40), 2)

    @pytest.mark.parametrize("place", [0, 21, 40])
    def test_one_more_row_computes_one_image(self, complete: Harness, plan: Plan, place: int) -> None:
        complete.run(plan, images(40), only_failed=True)
        self.compact(complete)
        fetched(complete)
        rows = images(40)
        rows.insert(place, Row(uri=uri(90)))
        assert complete.run(plan, rows, changed=True)
        assert fetched(complete) == {uri(90): 1}
        assert table(complete.store).equals(from_scratch(complete, plan, rows))

    @pytest.mark.parametrize("kills", [range(1, 9), range(9, 30, 3)])
    def test_a_kill_at_any_write_is_gone_on_with(self, complete: Harness, kills: range) -> None:
        before, objects = table(complete.store), dict(complete.store.objects)
        for kill in kills:
            complete.store.objects = dict(objects)
            self.killed(complete, kill)
            rows = {
                row
                for name, data in complete.store.objects.items()
                if name.startswith("data/")
                for row in pq.read_table(io.BytesIO(data))["row"].to_pylist()
            }
            assert rows == set(range(40)), "no row is ever missing"
            self.compact(complete)
            assert table(complete.store).equals(before)
            assert complete.summary

    def test_of_a_merged_file_what_rows_it_has_is_read_and_not_their_heatmaps(
        self, complete: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.compact(complete, 10**7)
        find, whole = complete.store.find, []

        def counted(key: str, deadline: Deadline) -> bytes | None:
            whole.append(key)
            return find(key, deadline)

        monkeypatch.setattr(complete.store, "find", counted)
        done = read_done_rows(DatasetDir(complete.store), lambda _: True, lambda: None)
        assert len(done) == 39, "one row of 40 has failed"
        assert not whole, "a merged file may be a gigabyte, and several are read at once"

    @pytest.mark.parametrize("kill", [4, 6])
    @pytest.mark.parametrize("goes_on", ["compact", "backfill"])
    def test_a_kill_while_merged_files_are_merged_again_leaves_each_row_once(
        self, complete: Harness, plan: Plan, kill: int, goes_on: str
    ) -> None:
        self.compact(complete, 6000)  # two shards a file
        names = [name for name in complete.store.objects if name.startswith("data/merged-")]
        assert len(names) == 5
        before, target_bytes = table(complete.store), 2 * len(complete.store.objects[names[0]]) + 500
        self.killed(complete, kill, target_bytes)
        if goes_on == "compact":
            self.compact(complete, target_bytes)
        else:
            complete.run(plan, images(40), resume=True)
        assert table(complete.store).equals(before)
        summary = complete.summary
        assert summary is not None
        assert summary["files"] == sum(name.startswith("data/") for name in complete.store.objects)

    def killed(self, harness: Harness, after: int, target_bytes: int | None = None) -> None:
        """Merge with a store that fails from the given change on."""
        changes = [0]
        store = harness.store
        put, remove = store.put, store.remove

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*given: Any) -> Any:
                changes[0] += 1
                if changes[0] > after:
                    message = "Killed."
                    raise StorageUnavailable(message)
                return change(*given)

            return changed

        store.put, store.remove = counted(put), counted(remove)  # type: ignore[method-assign]
        try:
            with contextlib.suppress(StorageUnavailable):
                self.compact(harness, target_bytes)
        finally:
            store.put, store.remove = put, remove  # type: ignore[method-assign]

    def test_a_backfill_that_goes_on_after_a_kill_leaves_each_row_once(
        self, complete: Harness, plan: Plan
    ) -> None:
        self.killed(complete, 6)
        assert complete.run(plan, images(40), only_failed=True)
        assert complete.rows() == dict.fromkeys(range(40), 2)
        assert fetched(complete) == {uri(6): 1}
        assert "compacting.json" not in complete.store.objects

    def test_a_dataset_that_is_not_complete_is_refused(self, complete: Harness) -> None:
        del complete.store.objects["dataset.json"]
        with pytest.raises(BackfillConflict, match=r"not complete: finish the backfill with --resume"):
            self.compact(complete)

    def test_files_are_read_by_groups_of_a_size(self, complete: Harness) -> None:
        self.compact(complete, target_bytes=10**7)
        (data,) = (data for name, data in complete.store.objects.items() if name.startswith("data/"))
        assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 1
        facts = json.loads(pq.read_schema(io.BytesIO(data)).metadata[b"gradcam"])
        assert [shard["first"] for shard in facts["shards"]] == list(range(0, 40, 4))
        assert (facts["rows"], facts["failed"], facts["codes"]) == (40, 1, {"image_not_found": 1})
