"""Where a network's weights come from: shipped, the operator's folder, or Keras's own download.

Never random by accident: random weights have to be asked for by name, and then say so.
"""

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import WeightsChecksumMismatch, WeightsUnavailable
from worker.gradcam.catalog import NetworkRow
from worker.gradcam.classes import DATA

DOWNLOAD_STALL_S = 30  # seconds without a byte before Keras's download counts as failed


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that is here, and what it is."""

    path: Path
    sha256: str


def where(row: NetworkRow, directory: Path | None) -> Path | None:
    """The row's weights file, or None where only Keras's own download is left.

    The operator's folder goes before the shipped file, so that a team can use its own weights.
    """
    names = (f"{row.name}.weights.h5", f"{row.name}.h5", *row.keras_files)
    for path in (directory / name for name in names) if directory else ():
        if path.is_file():
            return path
    return DATA / row.shipped if row.shipped else None


def locate(row: NetworkRow, directory: Path | None) -> WeightsFile | None:
    """As `where`, read and checked: the shipped file has to be the one that was shipped.

    Raises WeightsChecksumMismatch.
    """
    path = where(row, directory)
    if path is None:
        return None
    found = digest(path) if path.is_file() else "no file"
    if path.parent == DATA and found != row.sha256:
        message = f"{path} should have sha256 {row.sha256} but has {found}: install the package again."
        raise WeightsChecksumMismatch(message)
    return WeightsFile(path, found)


def download(
    row: NetworkRow, build: Callable[[], Any], cached: Callable[[], Path]
) -> tuple[Any, WeightsFile]:
    """Let Keras fetch the ImageNet weights into its cache while it builds the model.

    `cached` says where Keras has put them, once they are there. Raises WeightsUnavailable with the ways out.
    """
    try:
        with _stall_limit():
            model = build()
    except Exception as error:  # Keras raises plain Exception for a failed download
        message = (
            f"The weights of {row.name} are not here and could not be downloaded ({error}). "
            f"Put {row.name}.weights.h5 or {row.keras_files[0]} into the folder that "
            "GRADCAM_WEIGHTS_DIR names, or let this machine reach Keras's download once."
        )
        raise WeightsUnavailable(message) from error
    path = cached()
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
