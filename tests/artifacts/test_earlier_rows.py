"""Rows that earlier files hold: see tests/backfill/test_increments.py, too."""

from gradcam_worker.artifacts.dataset import to_bytes
from gradcam_worker.artifacts.earlier_rows import find_earlier_rows
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.shard import Row, data_key
from gradcam_worker.testing import MemoryStore
from tests.artifacts.test_dataset import GRID, NETWORK, NOT_FOUND, explained_row, shard_of

EARLIER = "00000001-0123456789abcdef"


def test_a_file_whose_rows_all_failed_holds_none() -> None:
    rows = (Row(uri="s3://in/a.png"), Row(uri="s3://in/b.png"))
    shard = shard_of(*rows, reuse=(EARLIER,))
    for outcomes, found in ((NOT_FOUND, NOT_FOUND), set[int]()), ((NOT_FOUND, explained_row()), {1}):
        store = MemoryStore()
        store.objects[data_key(EARLIER)] = to_bytes(shard, NETWORK, GRID, outcomes)[0]
        earlier = find_earlier_rows(shard, shard.row_digests(), store, Deadline(9), None)
        assert (earlier.indexes if earlier else set()) == found
