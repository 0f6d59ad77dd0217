"""Inspection of model files before Keras opens them: format, unpacked size, architecture.

Each reason for a refusal is the rest of a sentence that begins with the file. It ends with how to make a file
of it that can be loaded.
"""

import io
import json
import math
import re
import shlex
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

PRESET_FILES = ("config.json", "task.json")  # of keras-hub
MAX_MEMBERS = 10_000  # of an archive: Keras writes three, and one for each asset
MAX_DIRECTORY_BYTES = 4 * 1024**2  # of the list of members, which is read before they can be counted
MAX_CONFIG_BYTES = 32 * 1024**2  # the largest of keras.applications has 1 MB
MAX_METADATA_BYTES = 1024**2
MIN_ALLOWED_BYTES = 64 * 1024**2  # unpacked size that is always allowed
MAX_EXPANSION = 20  # unpacked size, as a multiple of the file size: Keras does not compress
MAX_CHECKED_WEIGHTS_BYTES = 256 * 1024**2  # of a weights file in an archive; larger ones are not inspected

SAVE = "save it with model.save('NAME.keras')"
CONVERT = "gradcam convert {0} NAME.keras"
BY_CONVERSION = f"convert it with `{CONVERT}`"
REBUILD = "build the same layers in Keras, hand their arrays to layer.set_weights(...), and " + SAVE
SAVED_MODEL = f"a SavedModel: {BY_CONVERSION}"
FOLDER = BY_CONVERSION.format("FOLDER")
WEIGHTS_ONLY = (
    "holds weights without their network: name it with weights, beside architecture; or build the network, "
    "model.load_weights({2!r}), and " + SAVE
)
HDF5 = f"is a whole model in HDF5: {BY_CONVERSION}"
PICKLE = f"is a pickle, which runs whatever code it holds: load it where you trust it, and {SAVE}"
BY_SCORES = "or name it as model = '{0}', and RISE and occlusion explain it"
FROM_ONNX = "`onnx2tf -i {0} -o made`, then `gradcam convert {1} NAME.keras`"
TORCH = (
    "is of PyTorch, which has no layers of Keras: in the program that made it, "
    "torch.onnx.export(model, image, 'NAME.onnx', dynamo=False), then convert that with "
    + FROM_ONNX.format("NAME.onnx", "made/NAME_float32.tflite")
)
OLD_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number with which the pickles of PyTorch before 1.6 begin
TENSORFLOW_JS = (
    "is of TensorFlow.js: convert it with `tensorflowjs_converter --input_format=tfjs_layers_model "
    "--output_format=keras {0} NAME.h5`, then "
    + BY_CONVERSION.format("NAME.h5").removeprefix("convert it with ")
)
# Why such a file is refused, and how to convert it; {0}: its name, quoted for a shell; {1}: what onnx2tf
# makes of it; {2}: its name.
BY_ENDING = {
    ".weights.h5": WEIGHTS_ONLY,
    ".h5": HDF5,
    ".hdf5": HDF5,
    ".pkl": PICKLE,
    ".pickle": PICKLE,
    ".joblib": PICKLE,
    "saved_model.pb": f"belongs to a SavedModel, a folder: {FOLDER}",
    ".pb": f"is a graph of TensorFlow: {BY_CONVERSION}",
    ".tflite": f"is of TensorFlow Lite: {BY_CONVERSION}, {BY_SCORES.format('x.tflite')}",
    ".onnx": f"is of ONNX, which has no layers of Keras: convert it with {FROM_ONNX}; "
    + BY_SCORES.format("x.onnx"),
    ".pt": TORCH,
    ".pth": TORCH,
    ".mlmodel": "is of Core ML, which cannot be converted back: take the model that it was made of, of Keras "
    "by model.save('NAME.keras'), of PyTorch by torch.onnx.export(model, image, 'NAME.onnx', dynamo=False)",
    ".ckpt": f"is a checkpoint, weights without their network: build it, load them, and {SAVE}",
    ".safetensors": f"holds arrays without their network: {REBUILD}",
    ".npz": f"holds arrays without their network: {REBUILD}",
    ".tfjs": TENSORFLOW_JS,  # no ending: such a file is called model.json
    ".json": "holds an architecture without weights: "
    f"model = keras.models.model_from_json(open({{2!r}}).read()), model.load_weights(...), and {SAVE}",
    ".zip": "is an archive: unpack it, and name the .keras file that is in it",
    ".tar": "is an archive: unpack it, and name the .keras file that is in it",
    ".gz": "is compressed: unpack it, and name the .keras file that is in it",
    "": f"looks like a folder, {SAVED_MODEL}",
}
NO_NETWORK = (
    "is JSON without a network: names of classes are named as `labels` beside the model, in the registry or "
    "to wrap_model"
)
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
PAGE_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
GIT_LFS_START = b"version https://git-lfs.github.com/spec/"
END_OF_ZIP = struct.Struct("<4s4H2LH")
END_OF_ZIP_SIGNATURE, MAX_COMMENT_BYTES = b"PK\x05\x06", 65_535  # bytes

# Raised for archives that are damaged, cut off, encrypted, or packed by an unknown method.
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Refused(ValueError):
    """A file is not loaded. The message is the rest of a sentence that begins with the file."""


Layout = Literal["keras3", "legacy", "model"]  # of an HDF5 file


def refusal_by_ending(address: str) -> str:
    """Why a file with this name is not loaded.

    Args:
        address: A path or URI that does not end in `.keras`.

    Returns:
        The reason, and how to convert the file.
    """
    name = PurePosixPath(address).name
    is_folder = address.endswith("/")
    listed = (suffix for suffix in BY_ENDING if suffix and name.lower().endswith(suffix) and not is_folder)
    ending = next(listed, "" if is_folder else PurePosixPath(name).suffix)
    return refusal(ending, name) if ending in BY_ENDING else f"is no Keras model: {SAVE}"


def refusal(ending: str, name: str) -> str:
    """Why a file with a known ending is not loaded.

    Args:
        ending: One of those in `BY_ENDING`.
        name: Of the file.

    Returns:
        The reason, and how to convert the file.
    """
    made = f"made/{PurePosixPath(name).stem}_float32.tflite"  # by onnx2tf
    return BY_ENDING[ending].format(shlex.quote(name), shlex.quote(made), name)


def refusal_by_content(path: Path, name: str) -> str | None:
    """Why a file is not loaded, by its first bytes.

    Args:
        path: The file.
        name: Its name in messages.

    Returns:
        The reason; None if the first bytes show none.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty (0 bytes): copy it again"
    if head.startswith(GIT_LFS_START):
        return "is a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`"
    if text.startswith(PAGE_STARTS):
        return "is a web page, an error or a login perhaps, not a model: download the file itself"
    is_json = text.startswith((b"{", b'["'))
    if is_json and b'"class_name"' not in text and not _is_of_tensorflow_js(path):
        return NO_NETWORK
    for ending, starts in (
        (".tfjs", text.startswith(b"{") and _is_of_tensorflow_js(path)),
        (".json", text.startswith(b"{")),
        (".pt", OLD_TORCH in head),
        (".tflite", head[4:8] == b"TFL3"),
        (".pkl", head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"),
        (".safetensors", head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < MAX_CONFIG_BYTES),
        (".gz", head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))),
        (".tar", head[257:262] == b"ustar"),
        (".onnx", head[:1] == b"\x08" and head[2:3] == b"\x12"),
    ):
        if starts:
            return refusal(ending, name)
    return None


def _is_of_tensorflow_js(path: Path) -> bool:
    """Whether a JSON file lists the files of its weights."""
    return path.stat().st_size <= MAX_CONFIG_BYTES and b'"weightsManifest"' in path.read_bytes()


def is_preset(folder: Path) -> bool:
    """Whether a folder is the preset of a classifier of keras-hub; a backbone alone has no task.

    Args:
        folder: The folder.
    """
    return all((folder / name).is_file() for name in PRESET_FILES)


def refusal_of_folder(path: Path) -> str | None:
    """Why a folder is not loaded as a model.

    Args:
        path: The folder.

    Returns:
        The reason; None if it is no model of any kind.
    """
    if (path / "saved_model.pb").is_file():
        return f"is a folder, {SAVED_MODEL.format(shlex.quote(path.name))}"
    if (path / "model.json").is_file() and _is_of_tensorflow_js(path / "model.json"):
        return refusal(".tfjs", f"{path.name}/model.json")
    if is_preset(path):
        return f"is a preset of keras-hub: convert it with `{CONVERT.format(shlex.quote(path.name))}`"
    if (path / "config.json").is_file() and (path / "model.weights.h5").is_file():
        return (
            "is a folder, a .keras file unpacked: pack what is in it, as in "
            f"`cd {path.name} && zip -0 -r ../NAME.keras .`"
        )
    return None


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read the configuration of a `.keras` model, and check the sizes of its members.

    Args:
        path: The file.
        name: Its name in messages.

    Returns:
        The configuration.

    Raises:
        Refused: It is something else, or unpacks to far more than its size.
        OSError: It cannot be read.
    """
    if (reason := refusal_by_content(path, name)) is not None:
        raise Refused(reason)
    with path.open("rb") as file:
        starts = file.read(len(HDF5_SIGNATURE))
    if starts == HDF5_SIGNATURE:
        if layout(path) == "model":
            raise Refused(refusal(".h5", name))
        right = name.removesuffix(".keras") + ".weights.h5"  # Keras chooses the format by it
        message = f"{refusal('.weights.h5', right)}; rename it to {right!r} for that"
        raise Refused(message)
    if not starts.startswith(b"PK"):
        message = f"is no Keras model, it begins with {starts!r}: {SAVE}"
        raise Refused(message)
    with _archive(path) as archive:
        members = _members(archive, path.stat().st_size)
        if "config.json" not in members:
            raise Refused(_refusal_of_archive([*members], name))
        try:
            config = json.loads(archive.read("config.json"))
        except RecursionError as error:
            message = "has a config.json that is nested too deeply"
            raise Refused(message) from error
        except ValueError as error:
            message = f"has a config.json that is no JSON: {error}"
            raise Refused(message) from error
        if not isinstance(config, dict):
            message = "has a config.json that describes no model"
            raise Refused(message)  # an error in the file, not in the program
        _check_arrays(archive, members)
    return config


def keras_version(path: Path) -> str:
    """Read the version of Keras that saved a `.keras` model.

    Args:
        path: The file.

    Returns:
        The version; empty if it is not in the file.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("metadata.json") as file:
            metadata = json.loads(file.read(MAX_METADATA_BYTES))
    except (OSError, KeyError, ValueError, RecursionError, zipfile.BadZipFile):
        return ""
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    return version if isinstance(version, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,31}", version) else ""


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive. Raises Refused if it is damaged, or has too many members."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - END_OF_ZIP.size - MAX_COMMENT_BYTES, 0))
        tail = file.read()
    at = tail.rfind(END_OF_ZIP_SIGNATURE)
    if at < 0 or len(tail) - at < END_OF_ZIP.size:
        message = f"is cut off after {size:,} bytes, the end of a .keras file is missing: copy it again"
        raise Refused(message)
    directory = END_OF_ZIP.unpack_from(tail, at)[5]
    if directory > MAX_DIRECTORY_BYTES:
        message = (
            f"is an archive whose list of members has {directory:,} bytes, above the "
            f"{MAX_DIRECTORY_BYTES:,} of any model"
        )
        raise Refused(message)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ARCHIVE_ERRORS as error:
        message = f"is a damaged .keras file ({error}): copy it again, or {SAVE}"
        raise Refused(message) from error


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """The unpacked sizes of the members. Not more than the declared size of a member is ever read.

    Raises Refused.
    """
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        message = f"is an archive of {len(infos):,} members, above the {MAX_MEMBERS:,} of any model"
        raise Refused(message)
    for name, count in Counter(member.filename for member in infos).items():
        if {"", ".."} & set(re.split(r"[/\\]", name.rstrip("/"))) or ":" in name:
            message = f"holds a member that leads out of it, {name[:100]!r}"
            raise Refused(message)
        if count > 1:
            message = f"holds {count} members of one name, {name[:100]!r}"
            raise Refused(message)
    members = {member.filename: member.file_size for member in infos}
    for name, limit in (("config.json", MAX_CONFIG_BYTES), ("metadata.json", MAX_METADATA_BYTES)):
        if members.get(name, 0) > limit:
            message = f"holds a {name} of {members[name]:,} bytes, above the {limit:,} of any model"
            raise Refused(message)
    _check_expansion("unpacks to", sum(members.values()), size)
    return members


def _check_expansion(verb: str, unpacked: int, size: int) -> None:
    allowed = max(MIN_ALLOWED_BYTES, MAX_EXPANSION * size)
    if unpacked > allowed:
        message = f"{verb} {unpacked:,} bytes, and has {size:,}: at most {allowed:,} are allowed of these"
        raise Refused(message)


def _refusal_of_archive(names: list[str], name: str) -> str:
    """Why an archive without `config.json` is refused."""
    by_file_name = {PurePosixPath(member).name: member for member in names}
    if "saved_model.pb" in by_file_name:
        return f"is an archive of a SavedModel: unpack it, and {FOLDER}"
    if "config.json" in by_file_name:
        folder = by_file_name["config.json"].rpartition("/")[0]
        return f"is an archive of the folder {folder[:100]!r}: pack what is in it, not the folder"
    if "data.pkl" in by_file_name:
        return TORCH
    if inner_model := next((member for member in names if member.endswith(".keras")), None):
        return f"is an archive: unpack it, and name {inner_model[:100]!r}, which is in it"
    if names and all(member.endswith(".npy") for member in names):
        return refusal(".npz", name)
    return f"is an archive without the config.json of a Keras model: {SAVE}"


def _check_arrays(archive: zipfile.ZipFile, members: dict[str, int]) -> None:
    """Raise Refused if weights declare arrays that are far larger than the file."""
    for name, size in members.items():
        if name.endswith(".h5") and size <= MAX_CHECKED_WEIGHTS_BYTES:
            _check_hdf5(io.BytesIO(archive.read(name)), size)


def _check_hdf5(file: Any, size: int) -> None:
    import h5py

    declared = 0

    def add_size(_: str, item: Any) -> None:
        nonlocal declared
        if isinstance(item, h5py.Dataset):
            declared += math.prod(item.shape or ()) * item.dtype.itemsize

    try:
        with h5py.File(file, "r") as opened:
            opened.visititems(add_size)
    except (OSError, RuntimeError, KeyError) as error:  # HDF5 raises any of them for damaged data
        message = f"holds damaged weights ({error}): copy it again, or {SAVE}"
        raise Refused(message) from error
    _check_expansion("declares arrays of", declared, size)


def check_weights(path: Path, name: str) -> Layout:
    """Check the weights file of an architecture.

    Args:
        path: The file.
        name: Its name in messages.

    Returns:
        Its layout.

    Raises:
        Refused: It is something else, or damaged.
        OSError: It cannot be read.
    """
    if (reason := refusal_by_content(path, name)) is not None:
        raise Refused(reason)
    with path.open("rb") as file:
        starts = file.read(len(HDF5_SIGNATURE))
    if starts.startswith(b"PK"):
        message = "is a whole model: name it with model, without architecture"
        raise Refused(message)
    if starts != HDF5_SIGNATURE:
        save = "save them with model.save_weights('NAME.weights.h5')"
        message = f"holds no weights, it begins with {starts!r}: {save}"
        raise Refused(message)
    _check_hdf5(path, path.stat().st_size)
    return layout(path)


def layout(path: Path) -> Layout:
    """Read the layout of an HDF5 file.

    Args:
        path: The file.

    Returns:
        The layout: weights of Keras 3, weights of Keras 2, or a whole model.

    Raises:
        Refused: It is damaged.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "model_config" in file.attrs:
                return "model"
            # A list that is too long for one attribute is split into layer_names0, layer_names1 and so on.
            legacy = any(attribute.startswith("layer_names") for attribute in file.attrs)
            return "legacy" if legacy else "keras3"
    except (OSError, RuntimeError, KeyError) as error:
        message = f"holds damaged weights ({error}): copy it again"
        raise Refused(message) from error


def count_rescalings(path: Path) -> int | None:
    """Count the layers `Rescaling` of the network of a weights file. They have no weights, only names.

    Args:
        path: The file.

    Returns:
        Their number; None if the file has none, which may mean that it does not list them.

    Raises:
        Refused: It is damaged.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            if "layer_names" in group.attrs:
                layer_names = [
                    name.decode() if isinstance(name, bytes) else name for name in group.attrs["layer_names"]
                ]
            else:
                group_name = next(
                    (name for name in ("layers", "_layer_checkpoint_dependencies") if name in file), None
                )
                layer_names = [*file[group_name]] if group_name else []
    except (OSError, RuntimeError, KeyError, UnicodeDecodeError) as error:
        message = f"holds damaged weights ({error}): copy it again"
        raise Refused(message) from error
    return sum(bool(re.fullmatch(r"rescaling(_[0-9]+)?", name)) for name in layer_names) or None
