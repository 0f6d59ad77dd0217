import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.explain import Explanation, Prediction, explain_image
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.report import MAX_PAGE_BYTES, page
from gradcam_worker.testing import TinyNetwork

Pixels = NDArray[np.uint8]
Noise = Callable[..., Pixels]
FACTS = {"Job": "job-1", "Image": "s3://photos/flag.png"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody asks for
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!-- <script>",
    "&lt;b&gt; &amp; \u2028\u2029",
    "javascript:alert(1)",
    "{{7*7}} ${7*7} `${alert(1)}` <%= 7 %> @DATA@ @STYLE@",
    "\u202egpj.exe\u2066\u200b \x1b[2J\x9b31m \x07\0 \ud800",
    "=cmd|' /C calc'!A1\r\n-->]]>",
]


@pytest.fixture
def pixels(noise: Noise) -> Pixels:
    return noise(48, 64)


@pytest.fixture
def explanation(tiny: TinyNetwork, pixels: Pixels) -> Explanation:
    return explain_image(tiny, pixels, classes=["blue", "red"])


def with_heatmaps(explanation: Explanation, heatmaps: NDArray[np.float32]) -> Explanation:
    """The same network and image, and k classes with these heatmaps (k, rows, columns)."""
    count = len(heatmaps)
    classes = tuple(
        Prediction(index + 1, index, f"n{index:08d}", f"class_{index}", 0.02) for index in range(count)
    )
    raw = np.linspace(-1, 1, count, dtype=np.float32)
    return replace(
        explanation, explained=classes, predictions=classes, heatmaps=heatmaps, raw_min=raw, raw_max=raw + 1
    )


def data_of(html: bytes) -> dict[str, Any]:
    blocks = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html.decode(), re.DOTALL)
    assert len(blocks) == 1
    return dict(json.loads(blocks[0]))


def heatmaps_of(html: bytes) -> NDArray[np.float64]:
    maps = data_of(html)["maps"]
    numbers = np.frombuffer(base64.b64decode(maps["uint16"]), "<u2") / 65_535
    return numbers.reshape(-1, maps["rows"], maps["columns"])


def photo_of(html: bytes) -> Pixels:
    """The photo on the page, (height, width, 3) RGB."""
    head, _, text = data_of(html)["photo"].partition(",")
    assert head == "data:image/jpeg;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.asarray(decoded[..., ::-1], np.uint8)


class TestSize:
    @pytest.mark.parametrize("size", [(1414, 1414), (1000, 2000), (5000, 400)])
    def test_two_megapixels_of_noise_make_a_page_below_the_limit(
        self, explanation: Explanation, noise: Noise, size: tuple[int, int]
    ) -> None:
        photo = noise(*size)
        html = page(explanation, photo, name="noise.png", facts=FACTS)
        assert MAX_PAGE_BYTES / 2 < len(html) < MAX_PAGE_BYTES, "and no smaller than necessary"
        height, width, _ = photo_of(html).shape
        assert height / width == pytest.approx(size[0] / size[1], rel=0.01)

    def test_fifty_classes_on_large_grids_with_long_facts_stay_below_the_limit(
        self, explanation: Explanation, noise: Noise
    ) -> None:
        heatmaps = np.random.default_rng(1).random((50, 150, 150), dtype=np.float32)
        many_classes, facts = (
            with_heatmaps(explanation, heatmaps),
            {f"fact {number}": "😀" * 3000 for number in range(20)},
        )
        html = page(many_classes, noise(1414, 1414), name="noise.png", facts=facts)
        assert len(html) < MAX_PAGE_BYTES
        drawn = heatmaps_of(html)
        assert drawn.shape == (50, 48, 48)
        assert_allclose(drawn[7], enlarge(heatmaps[7], (48, 48)), atol=1 / 65_535)
        assert ["Heatmap", "150 x 150 cells, shown as 48 x 48"] in data_of(html)["facts"]

    def test_a_photo_that_fits_keeps_its_size(self, explanation: Explanation) -> None:
        photo = np.full((1200, 1600, 3), (200, 100, 50), np.uint8)
        drawn = photo_of(page(explanation, photo, name="plain.png", facts=FACTS))
        assert drawn.shape == photo.shape
        assert_allclose(drawn.astype(int), photo, atol=2)

    def test_facts_and_names_of_megabytes_are_cut(self, explanation: Explanation, pixels: Pixels) -> None:
        long = "x" * 2_000_000
        data = data_of(page(explanation, pixels, name=long, facts={"Image": long}))
        assert data["facts"][0][1] == "x" * 999 + "…"
        assert len(data["title"]) == 1000


class TestContent:
    def test_the_heatmaps_are_exact_to_a_65535th(self, explanation: Explanation, noise: Noise) -> None:
        heatmaps = np.random.default_rng(1).random((50, 14, 14), dtype=np.float32)
        heatmaps /= heatmaps.max(axis=(1, 2), keepdims=True)
        html = page(with_heatmaps(explanation, heatmaps), noise(100, 100), name="flag.png", facts=FACTS)
        assert_allclose(heatmaps_of(html), heatmaps, atol=0.5 / 65_535 + 1e-7)

    def test_heatmaps_above_one_are_divided_by_the_highest_peak(
        self, explanation: Explanation, pixels: Pixels
    ) -> None:
        unnormalized = np.array([[[0, 8]], [[0, 2]]], np.float32)
        html = page(with_heatmaps(explanation, unnormalized), pixels, name="flag.png", facts=FACTS)
        assert_allclose(heatmaps_of(html), unnormalized / 8, atol=1e-5)

    def test_a_grid_finer_than_the_photo_is_shrunk_as_for_an_overlay(
        self, explanation: Explanation, noise: Noise
    ) -> None:
        heatmaps = np.random.default_rng(1).random((1, 14, 14), dtype=np.float32)
        heatmaps /= heatmaps.max()
        html = page(with_heatmaps(explanation, heatmaps), noise(5, 20), name="flag.png", facts=FACTS)
        assert_allclose(heatmaps_of(html)[0], enlarge(heatmaps[0], (5, 14)), atol=1e-5)

    def test_classes_predictions_and_facts_are_listed(self, explanation: Explanation, pixels: Pixels) -> None:
        facts = {"Date": "2026-11-30 08:12 UTC", "Layer": "top_conv", **FACTS}
        data = data_of(page(explanation, pixels, name="flag.png", facts=facts, metadata={"case": "7"}))
        assert data["title"] == "efficientnet_lite0 · flag.png"
        manifest = data["manifest"]
        assert [one["class"]["name"] for one in manifest["explanations"]] == ["blue", "red"]
        predicted, listed = explanation.predictions[0], manifest["predictions"][0]
        assert listed == {**vars(predicted), "probability": round(predicted.probability, 6)}
        first = manifest["explanations"][0]
        assert (first["rank"], first["class"]["wnid"]) == (explanation.explained[0].rank, "n3")
        assert (first["raw_min"], first["raw_max"]) == (explanation.raw_min[0], explanation.raw_max[0])
        assert data["lead"] == [["Date", "2026-11-30 08:12 UTC"], ["Layer", "top_conv"]]
        others = [["Heatmap", "4 x 4 cells"], ["Photo on this page", "64 x 48 pixels"]]
        assert data["facts"] == [*map(list, FACTS.items()), *others]
        assert data["metadata"] == [["case", "7"]]

    def test_metrics_are_listed_if_there_are_any(self, explanation: Explanation, pixels: Pixels) -> None:
        areas = ({"deletion": 0.1234, "insertion": 0.75}, {"deletion": 0.5, "insertion": 0.5})
        data = data_of(page(replace(explanation, metrics=areas), pixels, name="flag.png", facts=FACTS))
        assert tuple(one["metrics"] for one in data["manifest"]["explanations"]) == areas

    def test_method_normalization_and_warnings_are_told(
        self, explanation: Explanation, pixels: Pixels
    ) -> None:
        damaged = {"code": "image_damaged", "class_id": -1, "detail": "The lower half is missing."}
        options: dict[str, Any] = {"method": "counterfactual", "normalize": "joint", "warnings": [damaged]}
        manifest = data_of(page(explanation, pixels, name="flag.png", facts=FACTS, **options))["manifest"]
        assert manifest["method"] == {"name": "counterfactual", "normalize": "joint"}
        assert manifest["warnings"] == [damaged]

    def test_the_same_explanation_makes_the_same_bytes(
        self, explanation: Explanation, pixels: Pixels
    ) -> None:
        first, second = (page(explanation, pixels, name="flag.png", facts=FACTS) for _ in range(2))
        assert first == second


class TestSafety:
    def test_no_character_of_the_data_means_anything_to_html(
        self, explanation: Explanation, pixels: Pixels
    ) -> None:
        classes = tuple(Prediction(1, index, text, text, 0.5) for index, text in enumerate(HOSTILE))
        hostile = replace(
            with_heatmaps(explanation, np.ones((len(classes), 2, 2), np.float32)),
            explained=classes,
            predictions=classes,
        )
        html = page(hostile, pixels, name=HOSTILE[0], facts={text: text for text in HOSTILE})
        data = data_of(html)
        assert [one["class"]["wnid"] for one in data["manifest"]["explanations"]] == HOSTILE
        assert data["facts"][:-2] == [[text, text] for text in HOSTILE]
        block = html.partition(b'id="data">')[2].partition(b"</script>")[0]
        assert not re.search(rb"[<>&\x80-\xff]", block)

    def test_hostile_text_changes_nothing_outside_the_data(
        self, explanation: Explanation, pixels: Pixels
    ) -> None:
        plain, hostile = (
            page(explanation, pixels, name=name, facts={}).decode() for name in ("a", HOSTILE[0])
        )
        frame = r"(?s)(?<=id=\"data\">).*?(?=</script>)"
        assert re.sub(frame, "", plain) == re.sub(frame, "", hostile)

    def test_the_policy_allows_only_the_style_and_script_of_the_page(
        self, explanation: Explanation, pixels: Pixels
    ) -> None:
        html = page(explanation, pixels, name="flag.png", facts=FACTS).decode()

        def digest(tag: str) -> str:
            (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
            return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()

        policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', html)
        own = f"style-src 'sha256-{digest('style')}'; script-src 'sha256-{digest('script')}'"
        assert policy == [f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"]

    def test_the_template_has_no_address_and_builds_no_markup(self) -> None:
        names = ("page_head.html", "page.css", "report.html", "gradcam-viewer.js")
        template = "".join((DATA / name).read_text(encoding="utf-8") for name in names)
        template = template.replace(SVG_NAMESPACE, "")
        for forbidden in ("http:", "https:", "//cdn", "innerHTML", "outerHTML", "insertAdjacent", "eval("):
            assert forbidden not in template
        assert not re.search(r"\son\w+=|\sstyle=|document\.write", template)
