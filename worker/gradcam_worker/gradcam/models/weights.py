"""Where a network's weights come from: shipped, the operator's folder, Keras's own download, or, for an
operator's own network, the file that the registry names.

Never random by accident: random weights have to be asked for by name, and then say so.
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
from gradcam_worker.gradcam.models import model_file
from gradcam_worker.gradcam.models.file_cache import FileCache
from gradcam_worker.text.visible import abridged

DOWNLOAD_STALL_S = 30  # seconds without a byte before Keras's download counts as failed
# No file is to be read at a path: none is there, a folder is, a file is where a folder should be; no right to
# it; links in a loop; a name that is too long.
NOT_THERE = {
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
CHUNK = 1024 * 1024  # bytes copied at a time
MODEL_SUFFIXES = (".keras", ".weights.h5")  # Keras goes by them


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that is here, and what it is."""

    path: Path
    sha256: str


def _names(row: NetworkRow, directory: Path | None) -> tuple[Path, ...]:
    """Where a row's weights may be in the operator's folder."""
    names = (f"{row.name}.weights.h5", f"{row.name}.h5", *row.keras_files)
    return tuple(directory / name for name in names) if directory else ()


def where(row: NetworkRow, directory: Path | None) -> Path | None:
    """The row's weights file, or None where only Keras's own download is left.

    The operator's folder goes before the shipped file, so that a team can use its own weights.
    """
    for path in _names(row, directory):
        if path.is_file():
            return path
    return DATA / row.shipped if row.shipped else None


def here(row: NetworkRow, directory: Path | None, keras_home: Path) -> Path | None:
    """The weights file of a row of the catalog on this machine, Keras's own download too; not yet checked."""
    path = where(row, directory) or keras_home / "models" / row.keras_files[0]
    return path if path.is_file() else None


def put(row: NetworkRow) -> str:
    """How to hand over a network's weights where they cannot be downloaded: the rest of a sentence."""
    theirs = f"Keras's {row.keras_files[0]}, under that name, or " if row.keras_files else ""
    own = f"{row.name}.weights.h5 of your own"
    return f"put {theirs}{own} into the folder that GRADCAM_WEIGHTS_DIR names"


def locate(row: NetworkRow, directory: Path | None) -> WeightsFile | None:
    """As `where`, read and checked: the shipped file has to be the one that was shipped.

    Raises WeightsChecksumMismatch; WeightsUnavailable where the operator's file is a link that leads nowhere.
    """
    for link in _names(row, directory):
        if link.is_symlink() and not link.exists():
            message = f"{link} is a link that leads nowhere, or round in a circle: correct or remove it."
            raise WeightsUnavailable(message)
    path = where(row, directory)
    if path is None:
        return None
    found = digest(path) if path.is_file() else "no file"
    if path.parent == DATA and found != row.sha256:
        message = f"{path} should have sha256 {row.sha256} but has {found}: install the package again."
        raise WeightsChecksumMismatch(message)
    return WeightsFile(path, found)


class Sink(Protocol):
    """Where the bytes of a file go."""

    def expect(self, size: int, /) -> None:
        """It will have so many bytes, as far as that can be told. Raises WeightsUnavailable."""
        ...

    def write(self, data: bytes, /) -> int:
        """Take the next bytes."""
        ...


def cached_at(file: ModelFile, folder: Path) -> Path:
    """Where an operator's file is in the cache folder, once it has been fetched."""
    suffix = next((one for one in MODEL_SUFFIXES if file.uri.endswith(one)), "")
    return folder / (file.sha256 + suffix)


def cached(
    file: ModelFile, folder: Path, fetch: Callable[[str, Sink], None], max_bytes: int | None = None
) -> WeightsFile:
    """An operator's file in the cache folder, known to be the one that the registry pins.

    It is named by its checksum, so it is there whole or not at all, and two processes that fetch it at
    once write the same. A copy that has been damaged is fetched again. `fetch` writes what an `s3://`
    address holds into a sink, and raises WeightsUnavailable where it cannot. The folder holds no more than
    `max_bytes`: the files that were used least recently make room before the new one is there.

    Raises WeightsChecksumMismatch with both checksums, WeightsUnavailable.
    """
    cache = FileCache(folder, max_bytes)
    place = cached_at(file, folder)
    try:
        if not (_is_whole(place, file.sha256) and cache.touch(place)):
            _fetch(file, cache, place.name, fetch if file.uri.startswith("s3://") else _copy)
    except OSError as error:
        message = (
            f"{file.uri} could not be brought into the cache folder {folder}: {error}. GRADCAM_CACHE_DIR "
            "must name a folder that the worker may write to, with room for the file."
        )
        raise WeightsUnavailable(message) from error
    return WeightsFile(place, file.sha256)


def _is_whole(place: Path, sha256: str) -> bool:
    """Whether a file is here and undamaged; another process may be taking it away just now."""
    try:
        return place.is_file() and digest(place) == sha256
    except FileNotFoundError:
        return False


def _fetch(file: ModelFile, cache: FileCache, name: str, fetch: Callable[[str, Sink], None]) -> None:
    """Fetch a file beside its place; move it there in one step once its checksum is right."""
    with cache.new(name, file.uri) as part:
        fetch(file.uri, part)
        if part.sha256 != file.sha256:
            message = (
                f"{file.uri} should have sha256 {file.sha256} but has {part.sha256}: it was not loaded. "
                "If it is the file that you mean, write its sha256 into the registry."
            )
            raise WeightsChecksumMismatch(message)
        part.keep()


def _copy(path: str, sink: Sink) -> None:
    """Raises WeightsUnavailable where there is no such file, or it may not be read."""
    try:
        with Path(path).open("rb") as file:
            sink.expect(Path(path).stat().st_size)
            shutil.copyfileobj(file, sink, CHUNK)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        if isinstance(error, IsADirectoryError) and (told := model_file.of_folder(Path(path))):
            message = f"{path} {told}."
        else:
            message = (
                f"{path} cannot be read ({error.strerror}): put the network's file there, readable for the "
                "worker, or correct its address in the registry."
            )
        raise WeightsUnavailable(message) from error


def download(row: NetworkRow, build: Callable[[], Any], kept: Callable[[], Path]) -> tuple[Any, WeightsFile]:
    """Let Keras fetch the ImageNet weights into its cache while it builds the model.

    `kept` says where Keras has put them, once they are there. Raises WeightsUnavailable with the ways out.
    """
    try:
        with _stall_limit():
            model = build()
    except Exception as error:  # Keras raises plain Exception for a failed download
        message = (
            f"The weights of {row.name} are not here and could not be downloaded ({abridged(str(error))}). "
            f"Let this machine reach Keras's download once, or {put(row)}."
        )
        raise WeightsUnavailable(message) from error
    path = kept()
    return model, WeightsFile(path, digest(path))


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _stall_limit() -> Iterator[None]:
    """Keras's download sets no timeout of its own and would wait for ever on a dead connection."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
