"""Image classifiers of keras-hub, from presets on disk. Nothing is downloaded.

A preset is a folder that keras-hub's `save_to_preset` wrote, or the name of one that keras-hub has downloaded
before: it lies in the cache of kagglehub.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcam_worker import extras
from gradcam_worker.errors import NetworkIncompatible, WeightsUnavailable
from gradcam_worker.gradcam import backend
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import Head, Preprocessing
from gradcam_worker.gradcam.files import model_file
from gradcam_worker.gradcam.files.label_file import Labels
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.loading import wrap_model
from gradcam_worker.gradcam.sizing import Resize, Sizing
from gradcam_worker.text.similar_names import nearest
from gradcam_worker.text.visible import ending

KAGGLE = "kaggle://"
RESIZES: Mapping[tuple[str, bool], Resize] = {  # by interpolation, and whether it is with antialias
    ("nearest", False): "nearest",
    ("nearest", True): "nearest",
    ("bilinear", False): "bilinear",
    ("bilinear", True): "bilinear_antialias",
    ("bicubic", True): "bicubic_antialias",
    ("lanczos3", True): "lanczos",
}


@dataclass(frozen=True)
class PresetInput:
    """What a preset does to photos before its network sees them."""

    input_size: tuple[int, int]  # (height, width)
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    sizing: Sizing

    def preprocessing(self) -> Preprocessing:
        """Convert scale and offset."""
        scale, offset = (
            numbers * (max(len(self.scale), len(self.offset)) // len(numbers))
            for numbers in (self.scale, self.offset)
        )
        return Preprocessing(
            "keras-hub",
            tuple(0 - shift / factor for factor, shift in zip(scale, offset, strict=True)),
            tuple(1 / factor for factor in scale),
        )


def find_preset(preset: str | Path) -> Path:
    """Find a preset on disk.

    Args:
        preset: Its folder, or its name in keras-hub.

    Returns:
        The folder.

    Raises:
        MissingExtra: It is a name, and keras-hub is not installed.
        NetworkIncompatible: There is no such folder, and no such name.
        WeightsUnavailable: A preset of this name is not on disk.
    """
    folder = Path(preset)
    if model_file.is_preset(folder):
        return folder
    if folder.is_dir():
        names = " and ".join(model_file.PRESET_FILES)
        message = f"{folder} holds no preset of a classifier: {names} must be in it."
        raise NetworkIncompatible(message)
    known = _hub().models.ImageClassifier.presets
    name = str(preset)
    if name not in known:
        similar = nearest(name, known)
        hint = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        message = f"{name!r} is neither a folder nor the name of an image classifier of keras-hub.{hint}"
        raise NetworkIncompatible(message)
    handle = str(known[name]["kaggle_handle"]).removeprefix(KAGGLE)
    cache = Path(os.environ.get("KAGGLEHUB_CACHE") or Path.home() / ".cache" / "kagglehub")
    folder = cache / "models" / handle
    if not model_file.is_preset(folder):
        message = (
            f"The preset {name} is not in {folder}. Where there is a network, download it with python -c "
            f"\"import keras_hub; keras_hub.models.ImageClassifier.from_preset('{name}')\", and copy it."
        )
        raise WeightsUnavailable(message)
    return folder


def open_preset(folder: Path) -> Any:
    """Load the classifier of a preset.

    Args:
        folder: Of the preset.

    Returns:
        The Keras model, with its preprocessor.

    Raises:
        MissingExtra: keras-hub is not installed.
        NetworkIncompatible: It cannot be loaded.
    """
    hub = _hub()
    try:
        with backend.default_configuration():
            return hub.models.ImageClassifier.from_preset(str(folder.absolute()))
    except Exception as error:  # keras-hub, Keras and h5py raise anything for such a folder
        message = f"{folder} cannot be loaded as an image classifier of keras-hub: {ending(str(error))}"
        raise NetworkIncompatible(message) from error


def read_input(model: Any) -> PresetInput | None:
    """Read what a preset does to photos.

    Args:
        model: From `open_preset`.

    Returns:
        What it does; None where it cannot be told.
    """
    converter = getattr(getattr(model, "preprocessor", None), "image_converter", None)
    if converter is None or type(converter).call is not _hub().layers.ImageConverter.call:
        return None
    config = converter.get_config()
    resize = RESIZES.get((str(config["interpolation"]), bool(config["antialias"])))
    if resize is None or not config["image_size"]:
        return None
    height, width = config["image_size"]
    ways = {
        "crop_to_aspect_ratio": Sizing(resize, "crop"),
        "pad_to_aspect_ratio": Sizing(resize, "letterbox"),
    }
    sizing = next((sizing for key, sizing in ways.items() if config.get(key)), Sizing(resize))
    scale, offset = (_numbers(config[key], default) for key, default in (("scale", 1.0), ("offset", 0.0)))
    return PresetInput((int(height), int(width)), scale, offset, sizing)


def _numbers(given: Any, default: float) -> tuple[float, ...]:
    if given is None:
        return (default,)
    return tuple(float(number) for number in keras.tree.flatten(given))


def load_preset(
    preset: str | Path,
    *,
    labels: Labels = (),
    target_layer: str | None = None,
    head: Head | None = None,
    exact_backward: bool = False,
) -> KerasNetwork:
    """Load an image classifier of keras-hub from a preset on disk, with its own preprocessing.

    Args:
        preset: A folder that `save_to_preset` wrote, or the name of a preset that keras-hub has downloaded
            before.
        labels: As for `wrap_model`.
        target_layer: The layer to explain; default: found in the graph.
        head: How to read the outputs, if the graph does not show it.
        exact_backward: Run the whole backward pass, even if a shorter one gives the same result.

    Returns:
        A network for `explain_image`.

    Raises:
        MissingExtra: keras-hub is not installed.
        WeightsUnavailable: It is not on disk.
        NetworkIncompatible: It cannot be loaded or explained, or its preprocessing cannot be told.

    Examples:
        ```python
        network = load_preset("vit_base_patch16_224_imagenet", labels="imagenet")
        ```
    """
    folder = find_preset(preset)
    model = open_preset(folder)
    given = read_input(model)
    if given is None:
        message = (
            f"What {preset} does to photos cannot be told from its preprocessor: load it with keras-hub, and "
            "use wrap_model with preprocessing, sizing and input_size."
        )
        raise NetworkIncompatible(message)
    return wrap_model(
        model,
        preprocessing=given.preprocessing(),
        labels=labels,
        input_size=given.input_size,
        sizing=given.sizing,
        target_layer=target_layer,
        head=head,
        name=Path(preset).name,
        exact_backward=exact_backward,
    )


def _hub() -> Any:
    """The package keras_hub, which takes seconds to import. Raises MissingExtra."""
    with extras.required("A preset of keras-hub", "hub", extras.WORKER):
        import keras_hub
    return keras_hub
