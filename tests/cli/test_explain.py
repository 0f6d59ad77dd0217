"""`gradcam explain`."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gradcam_worker.cli.main import main
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.gradcam import wrap_callable
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.gradcam.network import Network
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.testing import TinyNetwork


@pytest.fixture(scope="module")
def lite0() -> Network:
    """EfficientNet-Lite0, loaded once for several runs of the command."""
    from gradcam_worker.gradcam.models.loading import load_network

    return load_network("efficientnet_lite0", forward="tensorflow")


@pytest.fixture
def one_lite0(eagerly: None, lite0: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command loads no network, and traces no function: that takes ten seconds a run."""
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", lambda *_: lite0)


@pytest.mark.tensorflow
class TestExplain:
    def test_files_are_explained_into_folders(
        self,
        photos: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("GRADCAM_MAX_BATCH", "2")  # to measure it takes seconds
        (tmp_path / "cut.jpg").write_bytes((photos / "coffee.jpg").read_bytes()[:-2])
        images = [*(str(photos / f"{name}.jpg") for name in ("coffee", "camera")), str(tmp_path / "cut.jpg")]
        assert main(["explain", *images, "--top-n", "2", "-o", str(tmp_path)]) == 0
        out, err = capsys.readouterr()
        assert f"{images[2]} image_damaged: 0.0% of the image is missing: its end marker is missing" in err
        assert err.count("image_damaged") == 1
        assert "espresso" in out
        assert "95.4 %" in out
        manifest = Manifest.model_validate_json((tmp_path / "coffee" / "manifest.json").read_bytes())
        assert [explanation.class_.id for explanation in manifest.explanations] == [967, 968]
        assert (tmp_path / "camera" / "overlay-1-872-tripod.jpg").exists()

    @pytest.mark.usefixtures("one_lite0")
    def test_any_artifact_and_metric_can_be_requested_and_metrics_are_shown(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = ["--artifact", "report", "--artifact", "overlay:png", "--metric", "deletion"]
        method = ["--method", "eigencam", "--layer", "auto", "--flip", "--top-n", "1"]
        assert main(["explain", str(photos / "coffee.jpg"), *results, *method, "-o", str(tmp_path)]) == 0
        heading, row, *_ = capsys.readouterr().out.splitlines()
        assert heading.split() == ["image", "folder", "rank", "id", "class", "probability", "deletion"]
        assert re.fullmatch(r"coffee.jpg +coffee/ +1 +967 +espresso +9\d\.\d % +0\.\d{3} *", row)
        names = sorted(path.name for path in (tmp_path / "coffee").iterdir())
        assert names == ["manifest.json", "overlay-1-967-espresso.png", "report.html"]
        manifest = Manifest.model_validate_json((tmp_path / "coffee" / "manifest.json").read_bytes())
        assert manifest.explanations[0].metrics.keys() == {"deletion"}
        assert (manifest.method.name, manifest.method.flip) == ("eigencam", True)

    @pytest.mark.usefixtures("one_lite0")
    def test_a_class_is_explained_against_others_and_all_results_say_so(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        contrast = ["--classes", "Egyptian cat", "--against", "tabby,lynx", "--artifact", "report"]
        image = str(photos / "chelsea.jpg")
        assert main(["explain", image, *contrast, "--artifact", "grid", "-o", str(tmp_path)]) == 0
        assert "Egyptian_cat, not 281 tabby or" in capsys.readouterr().out
        folder = tmp_path / "chelsea"
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
        assert [label.name for label in manifest.against] == ["tabby", "lynx"]
        assert "not 281 tabby or 287 lynx" in (folder / "report.html").read_text()
        assert main(["explain", image, "--classes", "281", "--against", "tabby", "-o", str(tmp_path)]) == 3
        assert "against itself" in capsys.readouterr().err

    @pytest.mark.usefixtures("one_lite0")
    def test_rise_is_chosen_with_its_parameters_and_these_are_refused_for_other_methods(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image = str(photos / "coffee.jpg")
        chosen = ["--method", "rise", "--masks", "31", "--mask-cells", "5", "--seed", "4", "--classes", "967"]
        assert main(["explain", image, *chosen, "-o", str(tmp_path)]) == 0
        method = Manifest.model_validate_json((tmp_path / "coffee" / "manifest.json").read_bytes()).method
        assert (method.name, method.masks, method.cells, method.seed) == ("rise", 31, 5, 4)
        assert main(["explain", image, "--occlusion-window", "9", "-o", str(tmp_path)]) == 3
        assert "window is a parameter of occlusion, not of gradcam" in capsys.readouterr().err

    @pytest.mark.usefixtures("one_lite0")
    def test_integrated_gradients_fill_all_artifacts_and_the_manifest_says_how_they_were_made(
        self, photos: Path, tmp_path: Path
    ) -> None:
        how = ["--method", "integrated_gradients", "--steps", "8", "--baseline", "blurred", "--top-n", "1"]
        kinds = ["--artifact", "heatmap", "--artifact", "report", "--artifact", "overlay"]
        assert main(["explain", str(photos / "coffee.jpg"), *how, *kinds, "-o", str(tmp_path)]) == 0
        manifest = Manifest.model_validate_json((tmp_path / "coffee" / "manifest.json").read_bytes())
        assert (manifest.method.steps, manifest.method.baseline) == (8, "blurred")
        assert (manifest.method.layer, manifest.network.layer) == (None, "input")
        [explained] = manifest.explanations
        assert explained.completeness_error is not None
        arrays = np.load(tmp_path / "coffee" / "heatmaps.npz")
        assert arrays["heatmaps"].shape == (1, 224, 224)
        assert arrays["raw_min"][0] < 0
        assert "8 steps from blurred" in (tmp_path / "coffee" / "report.html").read_text()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyNetwork:
    """The network that is loaded, whatever its name."""
    network = TinyNetwork()
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", lambda *_: network)
    return network


def write_image(folder: Path, name: str) -> Path:
    """Write a small image that can be explained."""
    cv2.imwrite(str(folder / name), np.full((16, 16, 3), 200, np.uint8))
    return folder / name


@pytest.mark.tensorflow
class TestManyFiles:
    """A file that fails does not stop the others."""

    @pytest.fixture
    def images(self, tmp_path: Path) -> list[Path]:
        """Eight files, of which only the first and the last are images."""
        (tmp_path / "page.jpg").write_text("<html>")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
        (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "none")
        bad = [tmp_path / f"{name}.jpg" for name in ("page", "empty", "folder", "circle", "nowhere", "none")]
        return [write_image(tmp_path, "a.png"), *bad, write_image(tmp_path, "z.png")]

    def test_the_others_are_explained_and_the_failures_are_listed_last(
        self, tiny: TinyNetwork, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", *map(str, images), "-o", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "z"]
        assert {"a.png", "z.png"} <= set(shown.out.split())
        lines = [line for line in shown.err.splitlines() if line.strip()]
        while "could not be explained" not in lines[0]:
            assert "zero_heatmap" in lines.pop(0), "a warning about a file that is explained"
        assert lines[0] == "6 of 8 could not be explained:"
        assert [line.split()[0] for line in lines[1:]] == [str(image) for image in images[1:-1]]
        assert "is a folder: name the files in it" in lines[3]
        assert "image_not_found: There is no file" in lines[6]

    def test_json_has_an_error_for_each_failed_file(
        self, tiny: TinyNetwork, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", *map(str, images), "--json", "-o", str(tmp_path / "out")]) == 1
        results = json.loads(capsys.readouterr().out)
        assert [result["image"] for result in results] == list(map(str, images))
        assert ["manifest" in result for result in results] == [True, *[False] * 6, True]
        assert results[1]["error"]["code"] == "unsupported_media_type"

    def test_a_file_with_any_name_is_explained_below_the_output(
        self, tiny: TinyNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folders = {
            "a[final].jpg": "a[final]",
            "[red]b.jpg": "[red]b",
            "...jpg": "image",
            "ü %?#.jpg": "ü %?#",
        }
        image = write_image(tmp_path, "a.png").read_bytes()
        files = [tmp_path / name for name in folders]
        for file in files:
            file.write_bytes(image)
        assert main(["explain", *map(str, files), "--top-n", "1", "-o", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in folders)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*folders.values()}
        for file in files:
            file.write_bytes(b"<html>")
        assert main(["explain", *map(str, files)]) == 1
        told = capsys.readouterr().err
        assert all(name in told for name in folders)

    def test_an_unexpected_error_is_one_files_failure(
        self,
        tiny: TinyNetwork,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        original, images = (
            TinyNetwork.compute,
            [write_image(tmp_path, name) for name in ("a.png", "b.png", "c.png")],
        )
        errors = iter([None, TypeError("fixed batch"), None])

        def compute(self: TinyNetwork, *args: Any) -> Any:
            if error := next(errors):
                raise error
            return original(self, *args)

        monkeypatch.setattr(TinyNetwork, "compute", compute)
        assert main(["explain", *map(str, images), "-o", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert "1 of 3 could not be explained:" in shown.err
        assert f"{images[1]} internal: Unforeseen TypeError: fixed batch" in shown.err
        assert {"a.png", "c.png"} <= set(shown.out.split())

    def test_an_interrupted_run_shows_its_results_and_can_be_repeated(
        self,
        tiny: TinyNetwork,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        images = [write_image(tmp_path, name) for name in ("a.png", "b.png")]
        monkeypatch.setattr("gradcam_worker.operations.explain.run_job", interrupted := Interrupted(1))
        command = ["explain", *map(str, images), "-o", str(tmp_path / "out")]
        assert main(command) == 130
        shown = capsys.readouterr()
        assert "a.png" in shown.out
        assert "Stopped." in shown.err
        (tmp_path / "out" / "b").mkdir()  # the state after a killed run
        (tmp_path / "out" / "b" / "overlay-1-0-red.jpg").write_bytes(b"half")
        interrupted.after = 9
        assert main(command) == 0
        assert "b.png" in capsys.readouterr().out

    def test_a_folder_that_cannot_be_written_is_one_files_failure(
        self, tiny: TinyNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = [write_image(tmp_path, name) for name in ("a.png", "b.png")]
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").touch()
        assert main(["explain", *map(str, images), "-o", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert "1 of 2 could not be explained:" in shown.err
        assert f"{images[0]} storage_unavailable: " in shown.err
        assert "b.png" in shown.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--classes", "gren"], "There is no class 'gren'. Near: 1 (green)"),
            (["--network", "efficientnet"], "Did you mean 'efficientnet_lite0'"),
        ],
    )
    def test_an_error_that_concerns_all_files_is_printed_once(
        self,
        options: list[str],
        message: str,
        tiny: TinyNetwork,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        images = [str(write_image(tmp_path, name)) for name in ("a.png", "b.png")]
        tiny.labels = ClassIndex.of(["red", "green", "blue"])
        assert main(["explain", *images, *options, "-o", str(tmp_path / "out")]) == 3
        assert capsys.readouterr().err.count(message) == 1


@pytest.mark.tensorflow
@pytest.mark.parametrize(("against", "explained"), [([], [0, 1]), (["--against", "malignant"], [0])])
def test_a_network_of_two_classes_needs_no_top_n(
    against: list[str],
    explained: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def score(pixels: Any) -> Any:
        return pixels.mean((1, 2))[:, :2] / 100 - [3, 4]

    network = wrap_callable(score, input_size=(16, 16), labels=["benign", "malignant"])
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", lambda *_: network)
    image = str(write_image(tmp_path, "a.png"))
    how = ["--method", "occlusion", "--json", "-o", str(tmp_path / "out")]
    assert main(["explain", image, *against, *how]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [explanation["class"]["id"] for explanation in result["manifest"]["explanations"]] == explained
    assert main(["explain", image, "--top-n", "3", *how]) == 3, "what somebody asks for is not changed"
    assert "top_n is 3: it must be from 1 to 2" in capsys.readouterr().err


class Interrupted:
    """Explains `after` files, and is interrupted at the next one."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return run_job(*args, **kwargs)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "options",
    [
        ["--classes", '"benign, no finding",malignant'],
        ["--classes", '"benign, no finding"', "--classes", "malignant"],
        ["--classes", '0, "malignant"'],
    ],
)
def test_names_with_commas_are_quoted(
    options: list[str], tiny: TinyNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.labels = ClassIndex.of(["benign, no finding", "malignant", "other"])
    image = str(write_image(tmp_path, "a.png"))
    assert main(["explain", image, *options, "--json", "-o", str(tmp_path / "out")]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [explanation["class"]["id"] for explanation in result["manifest"]["explanations"]] == [0, 1]
    assert main(["explain", image, "--classes", "benign, no finding"]) == 3
    assert (
        "a name that holds a comma stands in double quotes, as in '\"crane, bird\",pier'"
        in capsys.readouterr().err
    )


def test_an_unknown_artifact_is_refused_with_a_list_of_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").touch()
    assert main(["explain", str(tmp_path / "a.jpg"), "--artifact", "poster"]) == 3
    error = capsys.readouterr().err
    assert "'poster'" in error
    assert "'animation'" in error
