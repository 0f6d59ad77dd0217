"""How a network's photos must be resized, told by photos whose classes are known."""

import csv
import json
import math
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.cli.main import main
from gradcam_worker.errors import InvalidInput, NetworkIncompatible
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.gradcam.network_inputs import NetworkInput
from gradcam_worker.gradcam.sizing import SIZINGS, Resize, Sizing
from gradcam_worker.operations import sample, sample_check
from gradcam_worker.operations.sample import Photo, Sample
from gradcam_worker.operations.sample_check import Outcome, SampleReport, advise, candidates, check, setting
from gradcam_worker.testing import TinyNetwork

SIDE = 64
NEAREST, AREA = SIZINGS["keras.load_img"], SIZINGS["area"]
# The network calls a photo bright where more than .8 of it is white.
SLOPE, BIAS = 20, -16
STRIPES = np.zeros((SIDE, SIDE, 3), np.uint8)
STRIPES[:, 1::2] = 255
PATTERNS = {  # as `nearest` sees them at half their size, which takes the odd columns
    "white": np.full_like(STRIPES, 255),  # bright
    "black": np.zeros_like(STRIPES),  # dark
    "odd": STRIPES,  # bright; any mean of neighbours is grey, which is dark
    "even": 255 - STRIPES,  # dark
}


class Brightness(TinyNetwork):
    """Tells bright photos from dark ones, and counts its passes."""

    labels = ClassIndex.of(["dark", "bright"])

    def __init__(self, sizing: Sizing = AREA) -> None:
        self.facts = replace(
            TinyNetwork.facts, name="brightness", input_size=(32, 32), head="sigmoid", sizing=sizing
        )
        self.passes: list[int] = []

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.passes.append(len(pixels))
        score = SLOPE * pixels.mean((1, 2, 3)) / 255 + BIAS
        return np.stack([-score, score], 1).astype(np.float32)


def probability(brightness: float) -> float:
    """The probability of bright."""
    return 1 / (1 + math.exp(-SLOPE * brightness - BIAS))


def write_photos(folder: Path, *photos: tuple[str, str]) -> Path:
    """Write photos: each with its label and its pattern."""
    for index, (label, pattern) in enumerate(photos):
        (folder / label).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / label / f"{index}-{pattern}.png"), PATTERNS[pattern])
    return folder


# Of 16 photos 13 are right with nearest, where all stripes are; 11 where two of them are grey, and so dark.
PHOTOS = (
    *[("bright", "white")] * 4,
    *[("bright", "odd")] * 2,
    *[("dark", "black")] * 4,
    *[("dark", "even")] * 3,
    *[("bright", "black")] * 2,
    ("dark", "white"),
)
PLAIN = [photo for photo in PHOTOS if photo[1] != "odd"]


def sample_of(folder: Path) -> Sample:
    return sample.read(folder, Brightness())


def counts(report: SampleReport) -> dict[str, int]:
    return {outcome.name: outcome.count for outcome in report.outcomes}


class TestCheck:
    def test_a_network_is_right_as_often_as_it_was_made_to_be(self, tmp_path: Path) -> None:
        network = Brightness()
        report = check(network, sample_of(write_photos(tmp_path, *PHOTOS)), Limits(), max_batch=5)
        even_columns = "bilinear_tf1 in fractions, squash"  # at half the size: so all stripes are wrong
        others = {outcome.name for outcome in candidates(AREA)} - {"keras.load_img", even_columns}
        assert counts(report) == {"keras.load_img": 13, even_columns: 8, **dict.fromkeys(others, 11)}
        assert (report.photos, report.unreadable) == (16, {})
        assert report.advice.better == NEAREST
        assert report.advice.text.startswith(
            "Your model is right on 13 of 16 with keras.load_img and on 11 of 16 with area, as it is "
            'configured: set sizing = "keras.load_img". So small a difference may be chance'
        )

    def test_passes_are_full_and_equal_inputs_are_computed_once(self, tmp_path: Path) -> None:
        network = Brightness()
        check(
            network,
            sample_of(write_photos(tmp_path / "black", *[("dark", "black")] * 7)),
            Limits(),
            max_batch=3,
        )
        assert network.passes == [3, 3, 1], "black is black, however it is resized"
        network = Brightness()
        check(network, sample_of(write_photos(tmp_path / "odd", ("bright", "odd"))), Limits(), max_batch=3)
        assert 1 < sum(network.passes) < len(candidates(AREA))

    def test_each_photo_is_decoded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded = []

        def count(data: bytes, limits: Limits) -> Any:
            decoded.append(data)
            return decode(data, limits)

        monkeypatch.setattr(sample_check, "decode", count)
        check(Brightness(), sample_of(write_photos(tmp_path, *PHOTOS)), Limits(), max_batch=4)
        assert len(decoded) == len(PHOTOS)

    def test_a_photo_that_cannot_be_read_is_left_out_and_named(self, tmp_path: Path) -> None:
        write_photos(tmp_path, ("dark", "black"))
        (tmp_path / "dark" / "bad.jpg").write_text("<html>")
        photos = sample_of(tmp_path).photos
        gone = Photo(tmp_path / "gone.jpg", 0)
        report = check(Brightness(), Sample((*photos, gone)), Limits(), max_batch=4)
        assert report.photos == 1
        assert {path.name: error.code for path, error in report.unreadable.items()} == {
            "bad.jpg": "unsupported_media_type",
            "gone.jpg": "invalid_input",
        }
        with pytest.raises(InvalidInput, match=r"None of 1 photo can be read; .*gone.jpg: No such file"):
            check(Brightness(), Sample((gone,)), Limits(), max_batch=4)

    def test_scores_that_are_no_numbers_are_an_error(self, tmp_path: Path) -> None:
        class Broken(Brightness):
            def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
                return np.full((len(pixels), 2), np.nan, np.float32)

        photos = sample_of(write_photos(tmp_path, ("dark", "black")))
        with pytest.raises(NetworkIncompatible, match="scores for these photos that are no numbers"):
            check(Broken(), photos, Limits(), max_batch=4)

    def test_further_inputs_get_the_values_of_each_photo(self, tmp_path: Path) -> None:
        class Dated(Brightness):
            """Dark before 1900, whatever the photo shows."""

            def __init__(self) -> None:
                super().__init__()
                self.facts = replace(self.facts, inputs=(NetworkInput("year", minimum=1800.0),))

            def scores(
                self, pixels: NDArray[np.uint8], values: NDArray[np.float32] | None = None
            ) -> NDArray[np.float32]:
                assert values is not None
                assert values.shape == (len(pixels), 1)
                return super().scores(pixels) * np.where(values < 1900, -1, 1).astype(np.float32)

        write_photos(tmp_path, *[("bright", "white")] * 4)
        years = ("1850", "1950", "2000", None)
        photos = tuple(
            replace(photo, inputs={"year": year} if year else {})
            for photo, year in zip(sample_of(tmp_path).photos, years, strict=True)
        )
        report = check(Dated(), Sample(photos), Limits(), max_batch=2)
        assert {*counts(report).values()} == {2}
        assert [str(error) for error in report.unreadable.values()] == [
            'brightness needs year (number, from 1800 on) beside the image, as in "inputs": {"year": 1800}.'
        ]

    def test_the_largest_difference_to_the_owners_probabilities_is_found(self, tmp_path: Path) -> None:
        write_photos(tmp_path, ("bright", "odd"), ("bright", "white"))
        white = Photo(tmp_path / "bright" / "1-white.png", 1, {1: probability(1) - 0.001})
        odd = Photo(tmp_path / "bright" / "0-odd.png", 1, {0: 1 - probability(1), 1: probability(1)})
        report = check(Brightness(), Sample((white, odd)), Limits(), max_batch=4)
        found = {outcome.sizing: outcome.largest for outcome in report.outcomes}
        assert found[NEAREST] == pytest.approx(0.001, abs=1e-5)
        assert found[AREA] == pytest.approx(probability(1) - probability(0.5), abs=1e-3)
        assert report.advice.better == NEAREST


def test_the_ways_to_resize_are_each_tried_once_and_the_configured_one_first() -> None:
    outcomes = candidates(letterbox := Sizing("lanczos", "letterbox"))
    assert [outcome.sizing for outcome in outcomes if outcome.is_configured] == [letterbox]
    assert outcomes[0].sizing == letterbox
    sizings = [outcome.sizing for outcome in outcomes]
    assert len({*sizings}) == len(sizings)
    assert {*SIZINGS.values(), Sizing("bicubic_antialias"), Sizing("lanczos")} < {*sizings}
    names = {name for outcome in candidates(AREA) for name in outcome.names}
    assert names == {*SIZINGS}


def test_what_the_tool_does_besides_is_part_of_every_way_that_is_tried() -> None:
    outcomes = candidates(Sizing("nearest", grey="tf", fast_jpeg=True, recompress=75))
    sizings = {outcome.sizing for outcome in outcomes}
    assert {(sizing.grey, sizing.recompress) for sizing in sizings} == {("tf", 75)}
    assert {sizing.resize for sizing in sizings if sizing.fast_jpeg} == {*get_args(Resize)}
    assert {sizing.resize for sizing in sizings if not sizing.fast_jpeg} == {*get_args(Resize)}
    for outcome in candidates(Sizing(fast_jpeg=True)):
        assert all(SIZINGS[name] == outcome.sizing for name in outcome.names)


def outcome(sizing: Sizing, right: int, total: int = 16, differences: tuple[float, ...] = ()) -> Outcome:
    """An outcome; the configured sizing is `area`."""
    names = tuple(name for name, one in SIZINGS.items() if one == sizing)
    is_right = [index < right for index in range(total)]
    by_photo = {Path(f"{index}.jpg"): difference for index, difference in enumerate(differences)}
    return Outcome(sizing, names, sizing == AREA, is_right, by_photo)


BICUBIC = Sizing("bicubic_antialias")


class TestAdvice:
    def test_ways_that_are_equally_near_are_all_named(self) -> None:
        """OpenCV and TensorFlow compute the same but for rounding."""
        ways = [SIZINGS[name] for name in ("tf.image.resize", "opencv")]
        near = [outcome(way, 16, 16, (level,) * 3) for way, level in zip(ways, (0.0004, 0.0003), strict=True)]
        advice = advise([outcome(AREA, 16, 16, (0.1, 0.2, 0.38)), *near])
        assert "your own probabilities with opencv or tf.image.resize (median" in advice.text

    @pytest.mark.parametrize(
        ("area", "nearest", "expected", "better"),
        [
            (13, 13, "It makes no difference how photos are resized: your model is right on 13 of 16", None),
            (13, 12, "Your model is right on 13 of 16 with area, as it is configured; no other way", None),
            (8, 16, 'and on 8 of 16 with area, as it is configured: set sizing = "keras.load_img".', NEAREST),
        ],
    )
    def test_the_most_photos_decide_and_of_equals_the_configured_sizing(
        self, area: int, nearest: int, expected: str, better: Sizing | None
    ) -> None:
        advice = advise([outcome(NEAREST, nearest), outcome(AREA, area)])
        assert expected in advice.text
        assert advice.better == better
        assert "chance" not in advice.text

    @pytest.mark.parametrize(("gained", "is_chance"), [(1, True), (5, True), (6, False), (20, False)])
    def test_a_difference_that_may_be_chance_is_called_so(self, gained: int, is_chance: bool) -> None:
        advice = advise([outcome(AREA, 30, 100), outcome(NEAREST, 30 + gained, 100)])
        assert ("may be chance" in advice.text) == is_chance

    def test_a_way_without_a_name_is_set_by_a_table(self) -> None:
        advice = advise([outcome(AREA, 1), outcome(BICUBIC, 16)])
        assert advice.text.endswith('configured: set sizing = { resize = "bicubic_antialias" }.')
        assert "16 of 16 with bicubic_antialias, squash and" in advice.text

    def test_each_key_that_is_tried_is_in_that_table(self) -> None:
        sizing = Sizing("bilinear", grey="tf", fast_jpeg=True, recompress=75)
        line = setting(sizing)
        assert line == 'sizing = { resize = "bilinear", grey = "tf", fast_jpeg = true, recompress = 75 }'
        assert Sizing(**tomllib.loads(line)["sizing"]) == sizing

    @pytest.mark.parametrize(("most_frequent", "is_guessing"), [(12, False), (13, True), (0, False)])
    def test_a_network_that_is_no_better_than_guessing_has_another_fault(
        self, most_frequent: int, is_guessing: bool
    ) -> None:
        advice = advise([outcome(AREA, 13), outcome(NEAREST, 13)], most_frequent=most_frequent)
        assert ("no better than guessing: compare the preprocessing" in advice.text) == is_guessing

    @pytest.mark.parametrize(
        ("area", "nearest", "expected", "better"),
        [
            ((0.0001,) * 3, (0.0004,) * 3, "gives your own probabilities with area, as it is config", None),
            ((0.0019,) * 3, (0.0001,) * 3, "gives your own probabilities with area, as it is config", None),
            ((0.1, 0.2, 0.38), (0, 0.0004, 0), "with keras.load_img (median difference less than", NEAREST),
            ((0.1, 0.2, 0.38), (0, 0, 4e-4), "0.0001, largest 0.0004), not with area, as it is", NEAREST),
            ((0.1, 0.2, 0.38), (0, 0, 0.5), "configured (median difference 0.2, largest 0.38): set", NEAREST),
            ((0, 0, 0, 0.3, 0.38), (0, 0, 0, 0, 0.01), 'set sizing = "keras.load_img".', NEAREST),
            (
                (0.1, 0.2, 0.3),
                (0.1, 0.12, 0.1),
                "A median of 0.1 is more than a resize explains: co",
                NEAREST,
            ),
            ((0.1, 0.12, 0.1), (0.1, 0.2, 0.3), "is nearest to your own probabilities with area", None),
        ],
    )
    def test_the_owners_probabilities_decide_before_the_number_of_right_photos(
        self, area: tuple[float, ...], nearest: tuple[float, ...], expected: str, better: Sizing | None
    ) -> None:
        advice = advise([outcome(AREA, 16, 16, area), outcome(NEAREST, 8, 16, nearest)])
        assert expected in advice.text
        assert advice.better == better

    @pytest.mark.parametrize(
        ("differences", "is_said"), [((0, 0, 0.3), True), ((0, 0, 0.01), False), ((0, 0.4, 0.3), False)]
    )
    def test_converted_colours_may_be_what_one_photo_differs_by(
        self, differences: tuple[float, ...], is_said: bool
    ) -> None:
        advice = advise([outcome(AREA, 16, 16, differences)], converted={Path("2.jpg"): "Display P3"})
        said = "is that of 2.jpg, whose colours were converted from Display P3"
        assert (said in advice.text) == is_said == ("GRADCAM_CONVERT_COLORS=false" in advice.text)


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Registers a Keras network that tells bright photos from dark ones, with a line of its own."""
    import keras

    convolution = keras.layers.Conv2D(
        1, 1, name="mean", kernel_initializer=keras.initializers.Constant(1 / 3)
    )
    unit = keras.layers.Dense(
        1,
        "sigmoid",
        kernel_initializer=keras.initializers.Constant(SLOPE),
        bias_initializer=keras.initializers.Constant(BIAS),
    )
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, unit(keras.layers.GlobalAveragePooling2D()(convolution(inputs))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between Keras and NumPy
        model.save(tmp_path / "brightness.keras")
    checksum = file_sha256(tmp_path / "brightness.keras")
    (tmp_path / "class_indices.json").write_text('{"bright": 1, "dark": 0}')
    monkeypatch.setenv("GRADCAM_NETWORKS", str(tmp_path / "networks.toml"))
    monkeypatch.setenv("GRADCAM_CACHE_DIR", str(tmp_path / "cache"))

    def register(line: str = "") -> None:
        (tmp_path / "networks.toml").write_text(
            f'[networks.brightness]\nmodel = "brightness.keras"\nsha256 = "{checksum}"\n'
            'labels = "class_indices.json"\npreprocessing = "unit"\ninput_size = [32, 32]\n' + line
        )

    register()
    return register


@pytest.mark.tensorflow
class TestCommand:
    """`gradcam doctor --sample` with a network of Keras."""

    def test_the_line_that_it_names_makes_the_network_right(
        self, registered: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(write_photos(tmp_path / "photos", *PHOTOS))
        assert main(["doctor", "--sample", folder]) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "area 11 68.8 % configured" in shown
        assert "keras.load_img 13 81.2 %" in shown
        sentence = "Your model is right on 13 of 16 with keras.load_img and on 11 of 16 with area"
        assert f'{sentence}, as it is configured: set sizing = "keras.load_img".' in shown
        registered('sizing = "keras.load_img"\n')
        assert main(["doctor", "--sample", folder, "--network", "brightness"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "right on 13 of 16 with keras.load_img, as it is configured; no other way is better" in shown

    @pytest.mark.usefixtures("registered")
    def test_the_owners_probabilities_are_compared(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_photos(tmp_path / "photos", *PLAIN, ("bright", "odd"))
        own = {"white": probability(1), "odd": probability(1)}
        with (tmp_path / "sample.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", "bright", "age"])
            for path in sorted((tmp_path / "photos").rglob("*.png")):
                value = own.get(path.stem.partition("-")[2], probability(0))
                table.writerow([path.relative_to(tmp_path), path.parent.name, value, 61])
        command = ["doctor", "--sample", str(tmp_path / "sample.csv")]
        assert main([*command, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["network"], found["photos"], found["unused_columns"]) == ("brightness", 15, ["age"])
        by_name = {sizing["sizing"]: sizing for sizing in found["sizings"]}
        nearest, area = by_name["nearest, squash"], by_name["area, squash"]
        assert nearest["largest_difference"] < 1e-5
        assert area["largest_difference"] == pytest.approx(probability(1) - probability(0.5), abs=0.01)
        assert (area["configured"], nearest["configured"], nearest["presets"]) == (
            True,
            False,
            ["keras.load_img"],
        )
        assert found["set"] == 'sizing = "keras.load_img"'
        assert main(command) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "difference largest" in shown
        assert "Columns that name no class, and were not used: age" in shown

    @pytest.mark.usefixtures("registered")
    def test_a_limit_takes_photos_of_all_classes_and_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(write_photos(tmp_path / "photos", *PLAIN))
        assert main(["doctor", "--sample", folder, "--limit", "4"]) == 0
        shown = capsys.readouterr().out
        assert "right of 4" in shown
        assert "4 of 14 photos, of all classes: --limit takes more." in shown

    @pytest.mark.usefixtures("registered")
    def test_a_folder_that_is_no_class_is_an_error(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "photos" / "grey").mkdir(parents=True)
        assert main(["doctor", "--sample", str(tmp_path / "photos")]) == 3
        assert "Error (invalid_input): The folder 'grey' names no class" in capsys.readouterr().err

    def test_without_one_network_of_the_operators_own_it_must_be_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["doctor", "--sample", str(tmp_path)]) == 1
        assert "Say with --network which one is meant: GRADCAM_NETWORKS names none" in capsys.readouterr().err
        assert main(["doctor", "--sample", str(tmp_path), "--network", "vgg61"]) == 3
        assert "Did you mean 'vgg16'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--network", "--limit"])
def test_options_of_a_sample_belong_to_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", option, "3"]) == 2
    assert f"{option} belongs to --sample" in capsys.readouterr().err
