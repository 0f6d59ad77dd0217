"""Sources of weights: the shipped file, the operator's folder, or the download of Keras; for an operator's
network, the file that the registry names.

Weights are never random by accident: random weights must be requested.
"""

import errno
import hashlib
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gradcam_worker.errors import WeightsChecksumMismatch, WeightsUnavailable
from gradcam_worker.gradcam.catalog import ModelFile, NetworkRow
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.files import model_file
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.text.visible import abridged

DOWNLOAD_STALL_S = 30  # seconds without a byte before Keras's download counts as failed
# No file can be read at a path: it is missing, or a folder, or below a file; access is denied; links form a
# loop; the name is too long.
UNREADABLE_ERRNOS = {
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
COPY_CHUNK_BYTES = 1024 * 1024  # 1 MiB
MODEL_SUFFIXES = (".keras", ".weights.h5", ".onnx", ".tflite")  # the format is chosen by them


@dataclass(frozen=True)
class WeightsFile:
    """A local weights file and its checksum."""

    path: Path
    sha256: str


def _candidate_paths(row: NetworkRow, directory: Path | None) -> tuple[Path, ...]:
    """Possible paths of weights in the operator's folder."""
    names = (f"{row.name}.weights.h5", f"{row.name}.h5", *row.keras_files)
    return tuple(directory / name for name in names) if directory else ()


def weights_path(row: NetworkRow, directory: Path | None) -> Path | None:
    """Find the weights file of a network; it is not read.

    The operator's folder has precedence over the shipped file, so that a team can use its own weights.

    Args:
        row: The network.
        directory: The operator's folder, if any.

    Returns:
        The path; None if the weights must be downloaded by Keras.
    """
    for path in _candidate_paths(row, directory):
        if path.is_file():
            return path
    return DATA / row.shipped if row.shipped else None


def local_weights_path(row: NetworkRow, directory: Path | None, keras_home: Path) -> Path | None:
    """Find the weights file of a network of the catalog, also one that Keras has downloaded; it is not read.

    Args:
        row: The network.
        directory: The operator's folder, if any.
        keras_home: The folder of Keras.

    Returns:
        The path; None if there is no such file.
    """
    path = weights_path(row, directory) or keras_home / "models" / row.keras_files[0]
    return path if path.is_file() else None


def how_to_provide(row: NetworkRow) -> str:
    """Tell how to provide weights without a download. Returns the rest of a sentence."""
    keras_file = f"Keras's {row.keras_files[0]}, under that name, or " if row.keras_files else ""
    own_file = f"{row.name}.weights.h5 of your own"
    return f"put {keras_file}{own_file} into the folder that GRADCAM_WEIGHTS_DIR names"


def find_weights(row: NetworkRow, directory: Path | None) -> WeightsFile | None:
    """Find and verify the weights file of a network. The shipped file must have its checksum.

    Args:
        row: The network.
        directory: The operator's folder, if any.

    Returns:
        The file; None if the weights must be downloaded by Keras.

    Raises:
        WeightsChecksumMismatch: The shipped file was changed, or is missing.
        WeightsUnavailable: The operator's file is a broken link.
    """
    for link in _candidate_paths(row, directory):
        if link.is_symlink() and not link.exists():
            message = f"{link} is a link that leads nowhere, or round in a circle: correct or remove it."
            raise WeightsUnavailable(message)
    path = weights_path(row, directory)
    if path is None:
        return None
    sha256 = file_sha256(path) if path.is_file() else "no file"
    if path.parent == DATA and sha256 != row.sha256:
        message = f"{path} should have sha256 {row.sha256} but has {sha256}: install the package again."
        raise WeightsChecksumMismatch(message)
    return WeightsFile(path, sha256)


class Sink(Protocol):
    """Something that the bytes of a file are written to."""

    def expect(self, size: int, /) -> None:
        """Prepare for a file of `size` bytes, if its size is known. Raises WeightsUnavailable."""
        ...

    def write(self, data: bytes, /) -> int:
        """Append bytes."""
        ...


def cache_path(file: ModelFile, folder: Path) -> Path:
    """The path of an operator's file in the cache.

    Args:
        file: The file.
        folder: Of the cache.

    Returns:
        The path, whether the file has been fetched or not.
    """
    suffix = next((suffix for suffix in MODEL_SUFFIXES if file.uri.endswith(suffix)), "")
    return folder / (file.sha256 + suffix)


def fetch_cached(
    file: ModelFile, folder: Path, fetch: Callable[[str, Sink], None], max_bytes: int | None = None
) -> WeightsFile:
    """Get an operator's file from the cache, fetched first if necessary, with a verified checksum.

    Files in the cache are named by their checksum and complete, so several processes may fetch the same file
    at once. A damaged copy is fetched again.

    Args:
        file: The file.
        folder: Of the cache.
        fetch: Writes what an `s3://` address holds into a sink; raises WeightsUnavailable if it cannot.
        max_bytes: Size of the cache, from which the least recently used files are removed; None: unlimited.

    Returns:
        The file in the cache.

    Raises:
        WeightsChecksumMismatch: The file has another checksum; the message has both.
        WeightsUnavailable: It cannot be fetched, or there is no room for it.
    """
    cache = FileCache(folder, max_bytes)
    path = cache_path(file, folder)
    try:
        if not (_is_whole(path, file.sha256) and cache.touch(path)):
            _fetch(file, cache, path.name, fetch if file.uri.startswith("s3://") else _copy)
    except OSError as error:
        message = (
            f"{file.uri} could not be brought into the cache folder {folder}: {error}. GRADCAM_CACHE_DIR "
            "must name a folder that the worker may write to, with room for the file."
        )
        raise WeightsUnavailable(message) from error
    return WeightsFile(path, file.sha256)


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether a file exists and is undamaged; another process may remove it at any time."""
    try:
        return path.is_file() and file_sha256(path) == sha256
    except FileNotFoundError:
        return False


def _fetch(file: ModelFile, cache: FileCache, name: str, fetch: Callable[[str, Sink], None]) -> None:
    """Fetch a file into the cache, where it appears once its checksum is verified."""
    with cache.create(name, file.uri) as partial:
        fetch(file.uri, partial)
        if partial.sha256 != file.sha256:
            message = (
                f"{file.uri} should have sha256 {file.sha256} but has {partial.sha256}: it was not loaded. "
                "If it is the file that you mean, write its sha256 into the registry."
            )
            raise WeightsChecksumMismatch(message)
        partial.commit()


def _copy(path: str, sink: Sink) -> None:
    """Copy a local file. Raises WeightsUnavailable if it does not exist or cannot be read."""
    try:
        with Path(path).open("rb") as file:
            sink.expect(Path(path).stat().st_size)
            shutil.copyfileobj(file, sink, COPY_CHUNK_BYTES)
    except OSError as error:
        if error.errno not in UNREADABLE_ERRNOS:
            raise
        if isinstance(error, IsADirectoryError) and (reason := model_file.refusal_of_folder(Path(path))):
            message = f"{path} {reason}."
        else:
            message = (
                f"{path} cannot be read ({error.strerror}): put the network's file there, readable for the "
                "worker, or correct its address in the registry."
            )
        raise WeightsUnavailable(message) from error


def download(
    row: NetworkRow, build: Callable[[], Any], downloaded_path: Callable[[], Path]
) -> tuple[Any, WeightsFile]:
    """Let Keras download the ImageNet weights while it builds the model.

    Args:
        row: The network.
        build: Builds the model.
        downloaded_path: Returns the path of the downloaded weights.

    Returns:
        The model and its weights file.

    Raises:
        WeightsUnavailable: The download failed; the message tells how to provide the weights.
    """
    try:
        with _stall_limit():
            model = build()
    except Exception as error:  # Keras raises plain Exception for a failed download
        message = (
            f"The weights of {row.name} are not here and could not be downloaded ({abridged(str(error))}). "
            f"Let this machine reach Keras's download once, or {how_to_provide(row)}."
        )
        raise WeightsUnavailable(message) from error
    path = downloaded_path()
    return model, WeightsFile(path, file_sha256(path))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _stall_limit() -> Iterator[None]:
    """Limit the wait for data: the download of Keras has no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
