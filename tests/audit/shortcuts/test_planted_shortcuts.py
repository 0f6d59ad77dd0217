"""The short form of `scripts/audit-evidence`: one training with a watermark.

The network's weights lie beside this file, so that it need not train it; run as a program, with `scripts` in
PYTHONPATH, it trains it anew. That a network learns is tested in test_compare_evidence.
"""

from pathlib import Path

import numpy as np
import pytest

from devtools.planted.evidence import audit_shapes, is_planted
from devtools.planted.shapes import CLASSES, Shapes, draw, plant_of
from devtools.planted.training import train, untrained, wrap
from gradcam_worker.audit.report import DatasetFacts
from gradcam_worker.audit.shortcuts.gaze import GazeOptions
from gradcam_worker.errors import UnknownNetwork, WeightsChecksumMismatch
from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.operations.trial_network import open_trial_network
from gradcam_worker.settings import Settings

pytestmark = [
    pytest.mark.tensorflow,
    # Keras's own code, where it saves a model.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
PLANT = plant_of("watermark", 2)
IMAGES = 400
TRAINED = Path(__file__).with_name("watermark_network.npz")


@pytest.fixture(scope="module")
def model() -> object:
    model = untrained()
    with np.load(TRAINED) as weights:
        model.set_weights([weights[str(number)].astype(np.float32) for number in range(len(model.weights))])
    return model


def save() -> None:
    """Train the network and keep its weights, in half precision."""
    weights = enumerate(train(2, PLANT).get_weights())
    np.savez_compressed(
        TRAINED, allow_pickle=False, **{str(number): weight.astype(np.float16) for number, weight in weights}
    )


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return draw(IMAGES, 5002, PLANT)


@pytest.mark.parametrize("boxes", [True, False])
def test_a_planted_watermark_is_named_first(
    model: object, shapes: Shapes, tmp_path: Path, boxes: bool
) -> None:
    report = audit_shapes(wrap(model), shapes, tmp_path, boxes=boxes)
    first = report.shortcuts[0]
    assert is_planted(first, PLANT)
    assert first.basis == ("boxes" if boxes else "other_classes")
    assert first.effect > 0.3
    assert first.confidence_interval[0] <= first.effect <= first.confidence_interval[1]
    assert first.share > 0.5
    assert len(first.examples) == 8
    assert report.masking.named == len(report.shortcuts)
    assert {cluster.class_id for cluster in report.clusters} == {one.id for one in report.classes}


def test_without_a_trial_suspects_stay_suspects(model: object, shapes: Shapes, tmp_path: Path) -> None:
    report = audit_shapes(wrap(model), shapes, tmp_path, boxes=True, options=GazeOptions())
    assert not report.shortcuts
    assert report.suspects[0].class_id == PLANT.class_id
    assert report.suspects[0].place == f"{PLANT.corner} corner"
    assert (report.masking.left_out, report.masking.untested) == ("it was turned off", len(report.suspects))

    def refuse(_: DatasetFacts) -> None:
        message = "There is no network 'shapes'."
        raise UnknownNetwork(message)

    options = GazeOptions(open_network=refuse)  # type: ignore[arg-type]  # it returns nothing
    report = audit_shapes(wrap(model), shapes, tmp_path, boxes=True, options=options)
    assert report.masking.left_out == "There is no network 'shapes'."


@pytest.fixture
def settings(model: object, tmp_path: Path) -> Settings:
    """The network in a registry."""
    file = tmp_path / "shapes.keras"
    model.save(file)  # type: ignore[attr-defined]  # of Keras
    registry = tmp_path / "networks.toml"
    registry.write_text(
        f'[networks.shapes]\nmodel = "{file.name}"\nsha256 = "{file_sha256(file)}"\n'
        f'preprocessing = "unit"\ninput_size = [48, 48]\nlabels = {[*CLASSES]}\n'
    )
    return Settings(
        networks=registry,
        cache_dir=tmp_path / "cache",
        image_schemes=("file",),
        image_roots=(str(tmp_path),),
        forward="tensorflow",
    )


def facts(**changes: object) -> DatasetFacts:
    fields = {
        "uri": "cams",
        "rows": 0,
        "explained": 0,
        "unpredicted": 0,
        "failed": 0,
        "codes": {},
        "explanations": 0,
        "labelled": 0,
        "accuracy": None,
        "located": 0,
        "network": "shapes",
        "layer": "maps",
        "weights_sha256": None,
        "method": {},
        "grid": (12, 12),
        "complete": True,
    }
    return DatasetFacts.model_validate(fields | changes)


def test_the_network_of_a_dataset_is_loaded_from_the_registry_with_its_weights(
    settings: Settings, shapes: Shapes, tmp_path: Path
) -> None:
    sha256 = file_sha256(tmp_path / "shapes.keras")
    with pytest.raises(WeightsChecksumMismatch, match=f"made with weights {'0' * 64}.*here it has {sha256}"):
        open_trial_network(settings, facts(weights_sha256="0" * 64))
    with pytest.raises(UnknownNetwork):
        open_trial_network(settings, facts(network="lost"))
    opened = open_trial_network(settings, facts(weights_sha256=sha256))
    audit_shapes(opened.network, shapes, tmp_path, boxes=True, options=GazeOptions())
    pixels, placement = opened.load((tmp_path / "images" / "00003.png").as_uri(), "")
    assert (pixels == shapes.pixels[3]).all()
    assert placement is None


if __name__ == "__main__":
    save()
