"""Where heat lies, why a prediction is right or wrong, and what an audit counts: no files."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.audit.causes import (
    BY_NOTHING,
    BY_REGIONS,
    BY_TYPICAL_HEAT,
    ELSEWHERE,
    ON_OBJECT,
    causes,
    places,
    to_learn,
)
from gradcam_worker.audit.dataset.class_codes import ClassCodes, ClassSums
from gradcam_worker.audit.dataset.counts import BestRows, KeyCounts
from gradcam_worker.audit.dataset.predictions import NONE
from gradcam_worker.audit.dataset.samples import Samples
from gradcam_worker.audit.dataset.typical_heat import TypicalHeat, heat_at_border
from gradcam_worker.audit.report import CAUSES, Thresholds
from gradcam_worker.errors import InvalidInput

NAN = float("nan")


def one(value: float) -> NDArray[np.float32]:
    return np.array([value], np.float32)


class TestPlaces:
    @pytest.mark.parametrize(
        ("inside", "area", "at_border", "agreement", "place", "basis"),
        [
            (0.6, 0.3, 0.9, 0.0, ON_OBJECT, BY_REGIONS),  # the box alone decides
            (0.4, 0.3, 0.0, 1.0, ELSEWHERE, BY_REGIONS),
            (0.2, 0.1, 0.0, NAN, ON_OBJECT, BY_REGIONS),  # twice its chance
            (0.19, 0.1, 0.0, NAN, ELSEWHERE, BY_REGIONS),
            (0.9, 0.8, 0.1, 1.0, ON_OBJECT, BY_TYPICAL_HEAT),  # a box of the whole image tells nothing
            (0.9, 0.8, 0.6, 1.0, ELSEWHERE, BY_TYPICAL_HEAT),
            (NAN, NAN, 0.1, 0.31, ON_OBJECT, BY_TYPICAL_HEAT),
            (NAN, NAN, 0.1, 0.29, ELSEWHERE, BY_TYPICAL_HEAT),
            (NAN, NAN, 0.5, NAN, ELSEWHERE, BY_TYPICAL_HEAT),
            (NAN, NAN, 0.1, NAN, NONE, BY_NOTHING),
            (NAN, NAN, NAN, NAN, NONE, BY_NOTHING),
        ],
    )
    def test_a_prediction_looks_at_the_object_or_elsewhere(
        self, inside: float, area: float, at_border: float, agreement: float, place: int, basis: int
    ) -> None:
        found = places(one(inside), one(area), one(at_border), one(agreement), Thresholds())
        assert (found[0].tolist(), found[1].tolist()) == ([place], [basis])

    def test_thresholds_can_be_changed(self) -> None:
        strict = Thresholds(inside=0.9, over_chance=5)
        assert places(one(0.8), one(0.3), one(0), one(NAN), strict)[0].tolist() == [ELSEWHERE]
        tolerant = Thresholds(at_border=0.8, agreement=0.1)
        assert places(one(NAN), one(NAN), one(0.7), one(0.2), tolerant)[0].tolist() == [ON_OBJECT]

    def test_right_and_wrong_have_causes(self) -> None:
        correct = np.array([1, 1, 0, 0, 1, NONE], np.int8)
        place = np.array([ON_OBJECT, ELSEWHERE, ON_OBJECT, ELSEWHERE, NONE, ON_OBJECT], np.int8)
        assert [CAUSES[code] for code in causes(correct, place)] == [*CAUSES, "unknown"]


def test_many_of_many_teach_more_than_few_of_few_or_than_a_small_share() -> None:
    assert to_learn(0, 0) == to_learn(0, 10) == 0
    ranked = [to_learn(*case) for case in ((120, 200), (1000, 100_000), (5, 5), (50, 1000), (1, 1))]
    assert ranked == sorted(ranked, reverse=True)
    # The lower end of the interval of 8 of 10: 0.4901625 (Newcombe 1998 gives the formula; by hand).
    assert_allclose(to_learn(8, 10), 8 * 0.4901625, atol=1e-3)


class TestTypicalHeat:
    def test_agreement_leaves_the_image_itself_out(self) -> None:
        rng = np.random.default_rng(0)
        maps = rng.random((12, 3, 4)).astype(np.float32)
        maps /= maps.mean((1, 2), keepdims=True)
        codes = np.array([0] * 7 + [1] * 5, np.int32)
        is_part = np.array([True] * 6 + [False] + [True] * 5)
        typical = TypicalHeat()
        for part in (slice(0, 4), slice(4, 12)):
            typical.add(np.where(is_part, codes, -1)[part], maps[part])
        found = typical.agreement(codes, maps, is_part, least_images=5)
        for image in range(7):
            others = [other for other in range(6) if other != image]
            mean = np.mean(maps[others], axis=0, dtype=np.float64)
            assert_allclose(found[image], (maps[image] * mean).sum() / (mean**2).sum(), rtol=1e-5)
        assert np.isnan(found[7:]).all(), "four others are too few"

    def test_its_mean_is_1_and_what_lies_elsewhere_has_0(self) -> None:
        rng = np.random.default_rng(1)
        maps = np.zeros((401, 4, 4), np.float32)
        maps[:400, 1, :] = rng.dirichlet(np.ones(4), 400)
        maps[400, 3, 0] = 1
        codes = np.zeros(401, np.int32)
        typical = TypicalHeat()
        typical.add(codes, maps)
        found = typical.agreement(codes, maps, np.full(401, True), 2)
        assert_allclose(found[:400].mean(), 1, atol=0.02)
        assert found[400] == 0

    def test_an_image_without_heat_agrees_with_nothing(self) -> None:
        typical, maps = TypicalHeat(), np.ones((5, 2, 2), np.float32)
        maps[0] = 0
        codes, is_part = np.zeros(5, np.int32), np.full(5, True)
        typical.add(codes, maps)
        assert typical.counts(1).tolist() == [4]
        found = typical.agreement(codes, maps, is_part, 2)
        assert np.isnan(found[0])
        assert_allclose(found[1:], 1)

    @pytest.mark.parametrize(("width", "height"), [(70, 50), (210, 50), (70, 100)])
    def test_heat_at_the_border_is_that_of_its_pixels(self, width: int, height: int) -> None:
        heat = np.random.default_rng(2).random((1, 5, 7))
        pixels = np.kron(heat[0], np.ones((height // 5, width // 7)))
        band = min(width, height) // 10
        inner = pixels[band:-band, band:-band].sum()
        found = heat_at_border(heat, np.array([width]), np.array([height]), 0.1)
        assert_allclose(found, 1 - inner / pixels.sum(), rtol=1e-5)
        assert np.isnan(heat_at_border(heat * 0, np.array([width]), np.array([height]), 0.1))


def test_class_codes_and_sums() -> None:
    classes, sums = ClassCodes(), ClassSums()
    assert classes.encode(np.array([9, 4, -1, 9], np.int32)).tolist() == [1, 0, -1, 1]
    assert classes.encode(np.array([700, 4], np.int32)).tolist() == [2, 0]
    assert (classes.ids, len(classes)) == ([4, 9, 700], 3)
    sums.add(np.array([1, -1, 1], np.int32), np.array([2.0, 5.0, 0.5]))
    sums.add(np.array([0], np.int32), np.array([1.0]))
    assert sums.of(3).tolist() == [1, 2.5, 0]
    maps = ClassSums()
    maps.add(np.array([2, 0, 2], np.int32), np.arange(12.0).reshape(3, 2, 2))
    assert maps.of(4)[2].tolist() == [[8, 10], [12, 14]]
    for wrong in (-2, 2**30):
        with pytest.raises(InvalidInput, match=f"class_id is {wrong}: expected 0 to"):
            classes.encode(np.array([wrong], np.int32))


def test_counts_and_best_rows_do_not_depend_on_how_they_are_added() -> None:
    rng = np.random.default_rng(3)
    keys, values = rng.integers(0, 9, 500), rng.integers(0, 20, 500).astype(np.float32)
    rows, indices = np.arange(500), np.zeros(500, np.int32)
    counts, best = KeyCounts(), BestRows(3)
    for part in (slice(0, 7), slice(7, 7), slice(7, 300), slice(300, 500)):
        counts.add(keys[part])
        best.add(keys[part], rows[part], indices[part], values[part])
    assert [totals.tolist() for totals in counts.totals()] == [
        list(range(9)),
        np.bincount(keys).tolist(),
    ]
    for key in range(9):
        mine = sorted((-values[row], row) for row in rows[keys == key])[:3]
        assert best.of(key) == tuple((row, 0) for _, row in mine)
    assert best.of(77) == ()


class TestSamples:
    @staticmethod
    def sampled(batches: list[NDArray[np.int64]], samples: Samples) -> dict[int, list[int]]:
        for rows in batches:
            codes = (rows % 3).astype(np.int32)
            wanted = samples.wanted(codes, rows)
            zeros = np.zeros(len(wanted), np.float32)
            names = ("probability", "heat_inside", "inside_area", "at_border")
            columns: dict[str, Any] = {
                **dict.fromkeys(names, zeros),
                "code": codes[wanted],
                "row": rows[wanted],
                "record": rows[wanted],
                "index": np.zeros(len(wanted), np.int32),
                "correct": np.zeros(len(wanted), np.int8),
                "truth": np.full(len(wanted), -1, np.int32),
                "heat": np.ones((len(wanted), 4, 4), np.float32),
                "uri": np.full(len(wanted), "s3://x/y", object),
                "sha256": np.full(len(wanted), "00", object),
                "boxes": np.full(len(wanted), None, object),
            }
            samples.add(columns)
        samples.class_ids = [5, 6, 7]
        return {one.class_id: one.rows.tolist() for one in samples.of_each_class()}

    def test_they_do_not_depend_on_files_or_their_order(self) -> None:
        rows = np.arange(3000)
        samples = Samples(max_rows=100)
        whole = self.sampled([rows], samples)
        parts = np.array_split(rows, 40)
        np.random.default_rng(0).shuffle(parts)
        assert self.sampled(parts, Samples(max_rows=100)) == whole
        assert [len(chosen) for chosen in whole.values()] == [100] * 3
        assert all(row % 3 == class_id - 5 for class_id, chosen in whole.items() for row in chosen)
        first = next(samples.of_each_class())
        assert (first.predicted, len(first)) == (1000, 100)

    def test_all_together_take_no_more_memory_than_allowed(self) -> None:
        samples = Samples(max_rows=512, max_bytes=40_000)
        sampled = self.sampled(np.array_split(np.arange(3000), 9), samples)
        assert samples.max_rows == 64
        assert [len(chosen) for chosen in sampled.values()] == [64] * 3
