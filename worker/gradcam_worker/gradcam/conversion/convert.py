"""Converts one file: opens the old model, makes a new one, compares them, and writes the new one."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import isclass
from pathlib import Path
from typing import Any

from gradcam_worker.errors import GradcamError, MissingExtra
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import PREPROCESSING, ModelFile, NetworkRow, Preprocessing
from gradcam_worker.gradcam.conversion import check, formats, sources
from gradcam_worker.gradcam.conversion.check import Checked
from gradcam_worker.gradcam.conversion.sources import Rebuild, Source
from gradcam_worker.gradcam.files import model_file
from gradcam_worker.gradcam.files.model_file import Refused
from gradcam_worker.gradcam.files.weights import WeightsFile, file_sha256
from gradcam_worker.gradcam.models import own_layers
from gradcam_worker.gradcam.models.loading import load_network
from gradcam_worker.text.visible import abridged

TOLERANCE = 1e-4  # largest difference of an output, as a share of the range of the outputs
IMAGE_RANK = 3  # (rows, columns, channels)


@dataclass(frozen=True)
class Converted:
    """A new file, and what is known about it. The names are keys of the JSON of `gradcam convert --json`.

    Attributes:
        source: The format of the old file.
        rebuilt: How the new model was made.
        sha256: Of the new file.
        difference: The largest difference of an output, as a share of the range of the outputs.
        images: How many inputs were compared.
        same_class: The share of them with the same largest output.
        spread: How much an output differs between inputs, as a share of the range of all outputs.
        passed_over: Why a better way to make it did not work; empty: there is none.
        left_out: Ranges of pixels in which rounding alone changes what the old model computes.
        input_size: (height, width); None: its input is no image.
        channels: Of the image.
        rescales: Whether its first layers rescale their input.
        layer: The layer that is explained by default; empty if the model cannot be explained.
        map_size: (rows, columns) of that layer.
        classes: Their number.
        problem: Why it cannot be explained; empty if it can be.
        photos: What is done to photos before, as keys of the registry; None: it is not known.
        imports: Modules that workers import before they load the new file, as layers of it are defined there.
    """

    source: str
    rebuilt: str
    sha256: str
    difference: float
    images: int
    same_class: float
    spread: float
    passed_over: str
    left_out: tuple[str, ...]
    input_size: tuple[int, int] | None
    channels: int
    rescales: bool = False
    layer: str = ""
    map_size: tuple[int, int] = (0, 0)
    classes: int = 0
    problem: str = ""
    photos: dict[str, Any] | None = None
    imports: tuple[str, ...] = ()


def convert(
    path: Path,
    output: Path,
    *,
    input_size: tuple[int, int] | None = None,
    tolerance: float = TOLERANCE,
    allow_code: bool = False,
    imports: Sequence[str] = (),
) -> Converted:
    """Convert a file. Call it in a process of its own: whatever is in the file is loaded by other libraries.

    Args:
        path: The old file or folder.
        output: Where to write the new one; must end in `.keras`.
        input_size: (height, width) of a model that takes images of any size.
        tolerance: The largest difference that the check accepts, as a share of the range of the outputs.
        allow_code: Whether code in the file may run.
        imports: Modules that define layers of the model, which the operator has installed.

    Returns:
        What was written.

    Raises:
        Refused: It cannot be converted, or the new model computes something else.
        MissingExtra: It needs the extra `convert`.
        OSError: A file cannot be read or written.
    """
    form = formats.recognise(path)
    if not allow_code and (reason := formats.code_in(path, form)):
        raise Refused(reason)
    with tempfile.TemporaryDirectory(prefix="gradcam-convert-") as temporary:
        folder = Path(temporary)
        try:
            source = sources.open_source(
                path, form, folder, input_size, allow_code=allow_code, imports=imports
            )
        except (Refused, MissingExtra):
            raise
        except own_layers.NotImported as error:
            message = f"needs {error.module} (--import), which cannot be imported: {error}"
            raise Refused(message) from error
        except Exception as error:  # whatever the libraries raise for such a file
            message = f"cannot be loaded: {_why_not_loaded(error, imports)}"
            raise Refused(message) from error
        _check_size(source, input_size)
        failures = []
        for rebuild in source.rebuilds:
            try:
                checked = _make(source, rebuild, output, tolerance)
            except Exception as error:  # noqa: BLE001  # there may be another way
                output.unlink(missing_ok=True)
                failures.append((rebuild, error))
            else:
                passed_over = _told(failures[0][1]) if failures else ""
                kept = _needed(imports, output)
                return _describe(source, rebuild, output, checked, passed_over, kept)
    raise _refusal(failures)


def _needed(modules: Sequence[str], file: Path) -> tuple[str, ...]:
    """Those of the imported modules that define or offer a class of the model in a file."""
    config = model_file.read_config(file, file.name)
    classes = {(str(node.get("module")), node.get("class_name")) for node in formats.nodes(config)}

    def is_needed(name: str) -> bool:
        offered = {
            (value.__module__, value.__name__) for value in vars(sys.modules[name]).values() if isclass(value)
        }
        return not classes.isdisjoint(offered) or any(
            f"{module}.".startswith(f"{name}.") for module, _ in classes
        )

    return tuple(name for name in modules if is_needed(name))


def _check_size(source: Source, input_size: tuple[int, int] | None) -> None:
    """Refuse a size that was asked for, and that the model does not take."""
    images = [spec.shape for spec in source.inputs if len(spec.shape) == IMAGE_RANK]
    if input_size and images and all(input_size not in {shape[:2], shape[1:]} for shape in images):
        (asked, taken) = (f"{height} x {width}" for height, width in (input_size, images[0][:2]))
        message = f"takes images of {taken}, not of {asked}: --input-size is for a model that takes any size"
        raise Refused(message)


def _make(source: Source, rebuild: Rebuild, output: Path, tolerance: float) -> Checked:
    """Write a new model, load it as workers do, and compare it with the old one."""
    rebuild.build().save(output)
    model = keras.saving.load_model(output, dict(rebuild.own), compile=False, safe_mode=True)
    return check.compare(source, model, tolerance)


def _refusal(failures: list[tuple[Rebuild, Exception]]) -> Refused:
    """Why no way led to a new model: the reason of the only one, or of each."""
    if len(failures) == 1:
        ((_, error),) = failures
        return Refused(_told(error) if isinstance(error, Refused) else f"cannot be rebuilt: {_told(error)}")
    reasons = "; ".join(f"{rebuild.description}, {_told(error)}" for rebuild, error in failures)
    return Refused(f"cannot be rebuilt: {reasons}")


def _why_not_loaded(error: Exception, imports: Sequence[str]) -> str:
    if not (match := own_layers.NOT_FOUND.search(str(error))):
        return _told(error)
    where = f" nor defined in {', '.join(imports)}" if imports else ""
    return (
        f"it has {match[1]!r}, which is no part of Keras{where}: install the package that defines it, and "
        "name its module, as in --import my_package.layers"
    )


def _told(error: Exception) -> str:
    return abridged(str(error)) or type(error).__name__


def _describe(
    source: Source,
    rebuild: Rebuild,
    output: Path,
    checked: Checked,
    passed_over: str,
    imports: tuple[str, ...],
) -> Converted:
    """Load the new file as a worker does, to tell what is explained."""
    images = [spec.shape for spec in source.inputs if len(spec.shape) == IMAGE_RANK]
    height, width, channels = images[0] if images else (0, 0, 0)
    sha256 = file_sha256(output)
    converted = Converted(
        source=source.description,
        rebuilt=rebuild.description,
        sha256=sha256,
        difference=checked.difference,
        images=checked.images,
        same_class=checked.same_class,
        spread=checked.spread,
        passed_over=passed_over,
        left_out=checked.left_out,
        input_size=(height, width) if images else None,
        channels=channels,
        photos=_photos(source),
        imports=imports,
    )
    if not images:
        return replace(converted, problem="its input is no image")
    row = NetworkRow(
        name=output.stem,
        input_size=(height, width),
        preprocessing=_any_preprocessing(channels),
        labels=(),
        file=ModelFile(str(output), sha256),
        imports=imports,
    )
    try:
        network: Any = load_network(row, file=WeightsFile(output, sha256), forward="tensorflow")
    except GradcamError as error:
        return replace(converted, problem=abridged(str(error)))
    facts = network.facts
    return replace(
        converted,
        rescales=facts.rescales,
        layer=facts.default_layer,
        map_size=facts.map_size,
        classes=len(network.labels),
    )


def _photos(source: Source) -> dict[str, Any] | None:
    """What is done to photos before, as keys of the registry."""
    if source.photos is None:
        return None
    given, sizing = source.photos, source.photos.sizing
    scaling = {"scale": [*given.scale], "offset": [*given.offset]}
    return {"preprocessing": scaling, "sizing": {"resize": sizing.resize, "fit": sizing.fit}}


def _any_preprocessing(channels: int) -> Preprocessing:
    if channels == PREPROCESSING["none"].input_channels:
        return PREPROCESSING["none"]
    return Preprocessing("none", channels="grey" if channels == 1 else channels)
