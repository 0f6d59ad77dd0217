"""`gradcam compare`: what it finds between two datasets, and what it refuses."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradcam_worker.audit.comparison.compare import ComparisonOptions, compare
from gradcam_worker.audit.comparison.report import ComparisonReport, ComparisonThresholds
from gradcam_worker.audit.report import HeatCells
from gradcam_worker.errors import InvalidInput
from gradcam_worker.testing import MemoryStore
from tests.audit.datasets import CENTER, CORNER, MIDDLE_BOX, Image, memory_dataset, spread_out

OTHER_WEIGHTS = {"name": "efficientnet_lite0", "layer": "blocks", "weights_sha256": "cd" * 32}
OTHER_NETWORK = {"name": "resnet50", "layer": "conv5", "weights_sha256": "ef" * 32}


def month(
    seed: int, moved: Sequence[int] = (), *, count: int = 40, first: int = 0, **fields: Any
) -> list[Image]:
    """Images of three classes with their heat around the middle; of `moved` classes around a corner."""
    images = []
    for class_id in range(3):
        heat = CORNER if class_id in moved else CENTER
        image = Image(class_id, truth=class_id, heat=heat, box=MIDDLE_BOX)
        images += spread_out(replace(image, **fields), count, seed=seed * 10 + class_id)
    return [
        replace(image, sha256=f"{first + number:064x}", uri=f"s3://photos/{first + number}.jpg")
        for number, image in enumerate(images)
    ]


def options(**thresholds: Any) -> ComparisonOptions:
    return ComparisonOptions(ComparisonThresholds(**thresholds))


def moved(report: ComparisonReport) -> list[int]:
    return sorted(one.a.id for one in report.classes if one.moved_by)


def peak(heat: HeatCells) -> int:
    cells = np.frombuffer(base64.b64decode(heat.cells), np.uint8)
    assert len(cells) == heat.rows * heat.columns == 49
    return int(cells.argmax())


class TestSameImages:
    def test_a_class_whose_heat_moved_is_named_with_both_reasons(self) -> None:
        a, b = memory_dataset(month(1)), memory_dataset(month(2, [1]), network=OTHER_WEIGHTS)
        report = compare(a, b)
        assert report.pairing.by == "sha256"
        assert moved(report) == [1]
        first = report.classes[0]
        assert first.moved_by == ("heat", "heat_inside")
        assert first.tested == 40
        assert first.heat.change > 0.8
        assert first.heat.q < 0.001
        assert first.heat.effect > 1
        assert first.heat_inside is not None
        assert first.heat_inside.change == pytest.approx(first.b.heat_inside - first.a.heat_inside, abs=1e-5)  # type: ignore[operator]
        assert first.heat_inside.change < -0.8
        assert report.figures["moved"] == 1
        assert report.figures["heat_inside_fall_max"] == pytest.approx(-first.heat_inside.change)
        assert report.figures["distance_max"] == first.heat.change

    def test_the_mean_heatmaps_of_a_class_are_in_the_report(self) -> None:
        report = compare(memory_dataset(month(1)), memory_dataset(month(2, [1])))
        assert [peak(side.heat) for side in (report.classes[0].a, report.classes[0].b)] == [24, 0]

    def test_the_images_that_changed_most_come_with_both_heatmaps(self) -> None:
        same = month(1)
        same[0] = replace(same[0], heat=CENTER)
        changed = [replace(same[0], heat=CORNER), *same[1:]]
        changed[50] = replace(changed[50], predicted=2, second=1, second_heat=(0.9, 0.5))
        report = compare(memory_dataset(same, shard_rows=16), memory_dataset(changed[::-1], shard_rows=9))
        first = report.images[0]
        assert (first.uri, first.class_a, first.a.row, first.b.row) == ("s3://photos/0.jpg", 0, 0, 119)
        assert first.distance > 0.9
        assert [peak(side.heat) for side in (first.a, first.b)] == [24, 0]
        assert (first.width, first.height, first.sha256) == (400, 300, "0" * 64)
        (other,) = [one for one in report.images if one.a.predicted != one.b.predicted]
        assert (other.a.row, other.a.predicted, other.b.predicted, other.b.rank) == (50, 1, 2, 2)
        assert report.figures["predictions_changed"] == pytest.approx(1 / 120, abs=1e-6)
        assert [one.distance for one in report.images] == sorted(
            (one.distance for one in report.images), reverse=True
        )

    def test_a_dataset_does_not_differ_from_itself(self) -> None:
        store = memory_dataset(month(1))
        report = compare(store, store)
        assert moved(report) == []
        assert report.differences == ()
        assert all(one.heat.p == 1 and one.heat.change == 0 for one in report.classes)
        assert report.figures["predictions_changed"] == 0
        assert report.figures["heat_inside_change"] == 0

    def test_images_are_found_by_their_addresses_where_their_bytes_changed(self) -> None:
        other_bytes = [
            replace(one, sha256=f"{9 << 200 | number:064x}") for number, one in enumerate(month(2, [2]))
        ]
        report = compare(memory_dataset(month(1)), memory_dataset(other_bytes))
        assert report.pairing.by == "uri"
        assert moved(report) == [2]
        with pytest.raises(InvalidInput, match="No image is in both datasets by its sha256"):
            compare(memory_dataset(month(1)), memory_dataset(other_bytes), ComparisonOptions(pair="sha256"))

    def test_images_of_one_dataset_are_left_out_and_counted(self) -> None:
        report = compare(memory_dataset(month(1)), memory_dataset(month(2)[:100]))
        assert (report.pairing.images_a, report.pairing.images_b, report.pairing.in_both) == (120, 100, 100)
        assert "20 of A and 0 of B" in " ".join(report.remarks)

    def test_the_order_and_the_files_of_a_dataset_make_no_difference(self) -> None:
        a, b = month(1), month(2, [1])
        report = compare(memory_dataset(a), memory_dataset(b, shard_rows=7))
        shuffled = [b[number] for number in np.random.default_rng(1).permutation(len(b))]
        other = compare(memory_dataset(a), memory_dataset(shuffled))
        assert [one.heat for one in other.classes] == [one.heat for one in report.classes]
        assert other.figures == report.figures

    def test_the_same_report_is_made_again(self) -> None:
        a, b = memory_dataset(month(1)), memory_dataset(month(2, [1]))
        text = compare(a, b).to_json()
        assert compare(a, b).to_json() == text
        assert ComparisonReport.model_validate_json(text).to_json() == text

    def test_a_small_change_is_significant_and_does_not_count(self) -> None:
        a = month(1)
        b = [replace(one, heat=(one.heat[0] + 0.02, one.heat[1])) for one in a]
        report = compare(memory_dataset(a), memory_dataset(b))
        assert all(one.heat.q < 0.01 for one in report.classes)
        assert moved(report) == []
        assert moved(compare(memory_dataset(a), memory_dataset(b), options(distance=0.01, effect=0))) == [
            0,
            1,
            2,
        ]


class TestOtherImages:
    def test_classes_are_compared_as_groups(self) -> None:
        a, b = memory_dataset(month(1)), memory_dataset(month(2, [0], first=5000, count=30))
        report = compare(a, b)
        assert report.pairing.by is None
        assert moved(report) == [0]
        assert report.images == ()
        assert report.figures["predictions_changed"] is None
        assert "what moved may be of the images as well as of the network" in " ".join(report.remarks)

    def test_groups_can_be_asked_for(self) -> None:
        a, b = memory_dataset(month(1)), memory_dataset(month(2, [1]))
        report = compare(a, b, ComparisonOptions(pair="none"))
        assert report.pairing.by is None
        assert moved(report) == [1]

    def test_equal_months_rarely_differ(self) -> None:
        alarms = sum(
            bool(
                moved(
                    compare(
                        memory_dataset(month(seed)),
                        memory_dataset(month(seed + 50, first=5000)),
                        options(distance=0, effect=0, inside=0),
                    )
                )
            )
            for seed in range(1, 13)
        )
        assert alarms <= 3  # 5 % of 12 are expected, even where the smallest distance counts


class TestClasses:
    def test_rare_classes_and_those_of_one_dataset_are_left_out_with_the_reason(self) -> None:
        a = [*month(1), *Image(7).times(5), *Image(8).times(20)]
        b = [*month(2), *Image(7).times(20), *Image(9).times(3)]
        report = compare(memory_dataset(a), memory_dataset(b), ComparisonOptions(pair="none"))
        assert [one.a.id for one in report.classes if one.a.id > 2] == []
        told = {one.name: (one.images_a, one.images_b, one.reason) for one in report.left_out}
        assert told == {
            "class_7": (5, 20, "too_few_images"),
            "class_8": (20, 0, "only_in_a"),
            "class_9": (0, 3, "only_in_b"),
        }
        assert report.figures["left_out"] == 3

    def test_classes_of_another_network_are_found_by_their_wordnet_ids(self) -> None:
        b = memory_dataset(month(2, [1]), network=OTHER_NETWORK)
        report = compare(memory_dataset(month(1)), b)
        assert report.classes_by == "wnid"
        assert moved(report) == [1]
        assert {one.what: (one.a, one.b) for one in report.differences} == {
            "network": ("efficientnet_lite0", "resnet50"),
            "layer": ("blocks", "conv5"),
            "weights_sha256": ("ab" * 32, "ef" * 32),
        }

    def test_datasets_without_a_common_class_are_refused(self) -> None:
        others = [replace(one, predicted=one.predicted + 10) for one in month(1)]
        with pytest.raises(
            InvalidInput, match="No class is in both datasets: they have classes such as 'class_0'"
        ):
            compare(memory_dataset(month(1)), memory_dataset(others))

    def test_the_images_of_a_class_are_chosen_as_asked_for(self) -> None:
        a = [replace(one, predicted=2, second=1) if one.predicted == 1 else one for one in month(1)]
        b = month(2)
        stores = memory_dataset(a), memory_dataset(b)
        counts = {
            rows: {
                one.a.id: (one.a.images, one.b.images, one.tested)
                for one in compare(*stores, options(rows=rows)).classes
            }
            for rows in ("predicted", "true", "all")
        }
        assert counts["predicted"] == {0: (40, 40, 40), 1: (0, 40, 40), 2: (80, 40, 40)}
        assert counts["true"] == {0: (40, 40, 40), 1: (40, 40, 40), 2: (40, 40, 40)}
        assert counts["all"] == {0: (40, 40, 40), 1: (40, 40, 40), 2: (80, 40, 40)}

    def test_images_without_heat_are_not_compared(self) -> None:
        heatmaps = np.zeros((120, 7, 7), np.float32)
        heatmaps[:35] = 1
        report = compare(memory_dataset(month(1), heatmaps=heatmaps), memory_dataset(month(2)))
        assert [(one.a.id, one.tested, one.a.images) for one in report.classes] == [(0, 35, 40)]
        assert {one.reason for one in report.left_out} == {"too_few_images"}


class TestWhatDiffers:
    def test_other_grids_are_compared_on_the_coarser_one(self) -> None:
        report = compare(memory_dataset(month(1), grid=(14, 14)), memory_dataset(month(1), grid=(7, 7)))
        assert moved(report) == []
        assert report.classes[0].a.heat.rows == 7
        assert "different grids" in " ".join(report.remarks)
        assert report.figures["distance_max"] < 0.05  # type: ignore[operator]

    def test_other_methods_are_refused_unless_they_are_asked_for(self) -> None:
        stores = memory_dataset(month(1)), memory_dataset(month(2), method="layercam")
        with pytest.raises(InvalidInput, match=r"gradcam in A and layercam in B.*--across-methods"):
            compare(*stores)
        report = compare(*stores, ComparisonOptions(across_methods=True))
        assert [one.what for one in report.differences] == ["method.name"]

    def test_heat_against_a_class_is_never_compared_with_heat_for_it(self) -> None:
        stores = memory_dataset(month(1)), memory_dataset(month(2), method="counterfactual")
        with pytest.raises(InvalidInput, match="lie on what counts against a class"):
            compare(*stores, ComparisonOptions(across_methods=True))

    def test_heatmaps_of_a_few_cells_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match="1 x 2 and 7 x 7 cells: with fewer than 4"):
            compare(memory_dataset(month(1), grid=(1, 2)), memory_dataset(month(1)))

    def test_datasets_of_the_previous_version_are_compared_by_their_heat(self) -> None:
        report = compare(
            memory_dataset(month(1), previous_version=True),
            memory_dataset(month(2, [1]), previous_version=True),
        )
        assert moved(report) == [1]
        assert report.classes[0].moved_by == ("heat",)
        assert report.figures["heat_inside_change"] is None
        assert report.figures["accuracy_a"] is None
        assert "it takes boxes or masks in both datasets" in " ".join(report.remarks)

    def test_an_incomplete_dataset_is_compared_and_told(self) -> None:
        report = compare(memory_dataset(month(1)), memory_dataset(month(2), complete=False))
        assert report.b.complete is False
        assert "B is not complete" in " ".join(report.remarks)

    def test_accuracy_and_failed_rows_are_figures(self) -> None:
        wrong = [replace(one, predicted=0, second=one.predicted or None) for one in month(2)]
        failed = [Image(error="image_not_found")] * 4
        report = compare(memory_dataset(month(1)), memory_dataset(wrong, failed))
        figures = report.figures
        assert figures["accuracy_a"] == 1
        assert figures["accuracy_b"] == pytest.approx(1 / 3, abs=1e-5)
        assert figures["accuracy_change"] == pytest.approx(-2 / 3, abs=1e-5)
        assert (figures["failed_a"], figures["failed_b"], figures["images_b"]) == (0, 4, 120)


class TestRefusals:
    @pytest.mark.parametrize(
        ("store", "reason"),
        [
            (MemoryStore(), "There is no dataset at memory://data"),
            (MemoryStore({"data/a.parquet": b"PAR1"}), "memory://data/a.parquet is no part of a dataset"),
            (
                memory_dataset([Image(error="image_not_found")] * 3),
                r"no row was explained \(image_not_found 3\)",
            ),
        ],
        ids=["nothing", "damaged", "all failed"],
    )
    def test_what_is_no_dataset_is_refused_on_either_side(self, store: MemoryStore, reason: str) -> None:
        for pair in ((store, memory_dataset(month(1))), (memory_dataset(month(1)), store)):
            with pytest.raises(InvalidInput, match=reason):
                compare(*pair)

    def test_files_with_other_grids_are_no_dataset(self) -> None:
        store = memory_dataset(month(1), grid=(7, 7))
        store.objects["data/99.parquet"] = next(iter(memory_dataset(month(1), grid=(4, 4)).objects.values()))
        with pytest.raises(InvalidInput, match=r"\(7, 7\) cells in one file and \(4, 4\) in another"):
            compare(store, memory_dataset(month(1)))


def test_the_report_is_plain_json() -> None:
    report = compare(memory_dataset(month(1)), memory_dataset(month(2, [1])))
    assert json.loads(report.to_json())["schema"] == "gradcam.comparison/v1"
