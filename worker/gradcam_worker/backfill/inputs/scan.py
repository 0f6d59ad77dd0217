"""Lists the files below a folder, or the objects below an S3 prefix, as rows with versions.

No file is opened: the worker that reads it finds out whether it is an image.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

from gradcam_worker.backfill.inputs.filters import NameFilter
from gradcam_worker.backfill.inputs.rows import MAX_VERSION, RowParser
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.s3_errors import S3_ERRORS, describe


def list_files(where: str, parser: RowParser, names: NameFilter) -> Iterator[Row]:
    """Yield every file below a folder, folder by folder in the order of names.

    A link to a folder is not followed, because it could form a cycle. It becomes a bad row, as does
    everything that is not a file.

    Args:
        where: The folder.
        parser: Makes the rows.
        names: Leaves files out, by their paths from the folder on, and resolved.
    """
    base = os.path.abspath(where)  # noqa: PTH100  # unlike `resolve`, it keeps links
    real = os.path.realpath(where)
    folders = [_entries(base)]
    number = 0
    while folders:
        path = next(folders[-1], None)
        if path is None:
            folders.pop()
            continue
        uri = "file://" + quote_from_bytes(os.fsencode(path))
        name = str(path)[len(base) :].lstrip("/")
        try:
            if stat.S_ISDIR(path.lstat().st_mode):
                if not names.skips_folder(name):
                    folders.append(_entries(path))
                continue
            if names.skips(name, f"{real.rstrip('/')}/{name}"):
                continue
            status = path.stat()
            problem = (
                None
                if stat.S_ISREG(status.st_mode)
                else "it is no file, and a link to a folder is not followed"
            )
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        if problem:
            yield parser.bad_row(number, uri, problem)
        else:
            yield parser.listed_row(uri, f"{status.st_size}-{status.st_mtime_ns}")
        number += 1


def _entries(folder: str | Path) -> Iterator[Path]:
    return (Path(folder, name) for name in sorted(os.listdir(folder)))  # noqa: PTH208  # names alone: there may be millions


def list_objects(
    where: str,
    settings: Settings,
    parser: RowParser,
    names: NameFilter,
    not_a_prefix: Callable[[str], str | None] = lambda _: None,
) -> Iterator[Row]:
    """Yield every object below an S3 prefix, without those that only mark folders.

    Args:
        where: The prefix, s3://bucket/prefix.
        settings: For S3.
        parser: Makes the rows.
        names: Leaves objects out, by their keys from the last slash of the prefix on, and whole.
        not_a_prefix: Called with the key of an object that equals the prefix; returns an error message if the
            prefix must not be listed.

    Raises:
        InvalidInput: The prefix cannot be listed, or must not be.
    """
    bucket, _, prefix = where[5:].partition("/")
    if not bucket:
        message = "names no bucket: write s3://bucket/prefix."
        raise InvalidInput(message)
    base = prefix.rpartition("/")[0]
    try:
        for item in S3(settings).list_objects(bucket, prefix):
            if item.key == prefix and item.size and (problem := not_a_prefix(prefix)):
                raise InvalidInput(problem)
            if not item.size and item.key.endswith("/"):
                continue
            if not names.skips(item.key[len(base) :].lstrip("/"), item.key):
                yield parser.listed_row(f"s3://{bucket}/{item.key}", item.etag[:MAX_VERSION] or None)
    except S3_ERRORS as error:
        message = f"cannot be listed: {describe(error)}"
        raise InvalidInput(message) from error
