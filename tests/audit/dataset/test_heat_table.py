"""The arrays that two datasets are compared by: who an image is, and what stays of too many."""

import numpy as np
import pytest

from gradcam_worker.artifacts.dataset import read_batches
from gradcam_worker.audit.dataset.heat_table import HeatRecords, HeatTable, digests_of_sha256, digests_of_uris
from gradcam_worker.testing import MemoryStore
from tests.audit.datasets import Image, memory_dataset


def table_of(store: MemoryStore, max_bytes: int = 10**9) -> HeatTable:
    table = HeatTable((7, 7), max_bytes=max_bytes)
    for number, name in enumerate(sorted(name for name in store.objects if name.endswith(".parquet"))):
        for batch in read_batches(store.objects[name]):
            table.add(batch, number)
    return table


def places(records: HeatRecords) -> list[tuple[int, int, int]]:
    return list(
        zip(*(array.tolist() for array in (records.class_ids, records.files, records.rows)), strict=True)
    )


def test_different_checksums_and_addresses_have_different_digests() -> None:
    hashes = [f"{number:064x}" for number in range(1000)] + [
        f"{number << 240:064x}" for number in range(1, 1000)
    ]
    assert len(np.unique(digests_of_sha256(hashes))) == len(hashes)
    assert len(np.unique(digests_of_sha256(["", None, "x" * 64, "e" * 63 + "g", "ab"]))) == 4
    assert digests_of_sha256(["ab" * 32]) == digests_of_sha256(["ab" * 32])
    assert len(np.unique(digests_of_uris(["a", "b", "", None]))) == 3
    assert len(digests_of_uris([])) == len(digests_of_sha256([])) == 0


def test_digests_are_evenly_spread() -> None:
    digests = digests_of_sha256([f"{number:064x}" for number in range(4000)])
    assert np.mean(digests < np.uint64(2**62)) == pytest.approx(0.25, abs=0.03)


def test_records_are_sorted_by_class_and_an_image_that_is_given_twice_counts_once() -> None:
    twice = Image(predicted=1, second=0, sha256="ab" * 32)
    store = memory_dataset([twice, Image(predicted=2), twice, Image(predicted=1)], shard_rows=2)
    found = places(table_of(store).records())
    assert found[0] == (0, 0, 0)
    assert sorted(found[1:3]) == [(1, 0, 0), (1, 1, 3)]
    assert found[3] == (2, 0, 1)


def test_of_too_many_images_a_sample_stays_that_does_not_depend_on_order_or_files() -> None:
    images = [Image(predicted=number % 3, sha256=f"{number * 7919:064x}") for number in range(300)]
    whole = table_of(memory_dataset(images))
    assert whole.share == 1
    size = sum(array.nbytes for array in vars(whole.records()).values()) // 3
    sampled = table_of(memory_dataset(images, shard_rows=7), size)
    assert sampled.share == 0.25
    kept = sampled.records()
    assert 40 < len(kept) < 110
    assert sum(array.nbytes for array in vars(kept).values()) <= size
    backwards = table_of(memory_dataset(images[::-1], shard_rows=50), size).records()
    assert np.array_equal(kept.by_sha256, backwards.by_sha256)
    whole.limit_to(sampled.limit)
    assert np.array_equal(whole.records().by_sha256, kept.by_sha256)


def test_labels_and_boxes_are_kept_and_missing_ones_are_unknown() -> None:
    box = (0.25, 0.25, 0.75, 0.75)
    records = table_of(memory_dataset([Image(0, truth=0, box=box), Image(0, truth=1), Image(0)])).records()
    by_row = records.take(np.argsort(records.rows))
    assert by_row.is_truth.tolist() == [True, False, False]
    assert by_row.correct.tolist() == [1, 0, -1]
    assert np.isfinite(by_row.heat_inside).tolist() == [True, False, False]
    plain = table_of(memory_dataset([Image(0)], previous_version=True)).records()
    assert plain.correct.tolist() == [-1]
    assert np.isnan([plain.heat_inside[0], plain.heat_at_border[0]]).all()
