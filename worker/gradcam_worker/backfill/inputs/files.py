"""Opens the files of an input, here or on S3, and unpacks them."""

import bz2
import gzip
import io
import lzma
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, cast

from gradcam_worker.errors import InvalidInput, WeightsUnavailable
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_user
from gradcam_worker.text.visible import visible

STDIN = "-"
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
MAX_MAGIC = 6  # bytes


class _LeftOpen(io.RawIOBase):
    """A file whose end is not the end of the file below it: Arrow closes what it reads."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read  # type: ignore[method-assign]

    def readable(self) -> bool:
        return True


def _zstd(file: Any) -> BinaryIO:
    import pyarrow as pa

    return cast("BinaryIO", pa.CompressedInputStream(pa.PythonFile(_LeftOpen(file), "r"), "zstd"))


_UNPACK: Mapping[bytes, Callable[[Any], Any]] = {  # first bytes -> what reads it
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def on_s3(where: str) -> bool:
    """Return whether a name is that of an object, a prefix or a bucket."""
    return where[:5].casefold() == "s3://"


def display_name(where: str) -> str:
    """Return a name without secrets, for messages."""
    if where == STDIN:
        return "Standard input"
    return visible(without_user(where) if "://" in where else where)[:4096]


def open_file(where: str, settings: Settings, stack: ExitStack) -> io.BufferedReader:
    """Open a file for reading; an object is copied first.

    Args:
        where: A path, `s3://bucket/key`, or `-` for standard input.
        settings: For S3.
        stack: Closes it.

    Returns:
        The file.

    Raises:
        InvalidInput: It cannot be read.
    """
    try:
        if where == STDIN:
            return cast("io.BufferedReader", sys.stdin.buffer)
        if not on_s3(where):
            return stack.enter_context(Path(where).open("rb"))
        from gradcam_worker.storage.s3 import S3

        copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        S3(settings).download("s3://" + where[5:], _FileSink(copy))
        copy.seek(0)
        return cast("io.BufferedReader", copy)
    except WeightsUnavailable as error:
        raise InvalidInput(str(error)) from error
    except (OSError, ValueError) as error:
        message = f"{display_name(where)} cannot be read: {getattr(error, 'strerror', None) or error}."
        raise InvalidInput(message) from error


class _FileSink:
    """See `gradcam_worker.gradcam.files.weights.Sink`."""

    def __init__(self, file: Any) -> None:
        self.write = file.write

    def expect(self, size: int) -> None:
        """Any size is accepted."""


def unpacked(file: io.BufferedReader) -> BinaryIO:
    """Return a file's content. What packed it is recognized by its first bytes, whatever its name."""
    magic = file.peek(MAX_MAGIC)[:MAX_MAGIC]
    unpack = next((unpack for start, unpack in _UNPACK.items() if magic.startswith(start)), None)
    return io.BufferedReader(unpack(file)) if unpack else file


def packed_name(name: str) -> str:
    """Return a name in small letters, without the suffix of what packed it."""
    folded = name.casefold()
    suffix = next((suffix for suffix in PACKED_SUFFIXES if folded.endswith(suffix)), "")
    return folded.removesuffix(suffix)
