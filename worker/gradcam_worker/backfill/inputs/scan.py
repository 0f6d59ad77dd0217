"""Every file below a folder, every object below an S3 prefix, as a row with its version.

No file is opened: the worker that reads it tells whether it is an image.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

from gradcam_worker.backfill.inputs.rows import RowParser
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.s3_errors import S3_ERRORS, describe

VERSION = 256  # characters: see `gradcam_worker.schemas.shard.Row`


def list_files(
    where: str, parser: RowParser, is_own_file: Callable[[str], bool] = lambda _: False
) -> Iterator[Row]:
    """Every file, in the order of names, folder by folder; none that is hidden, and of folders none either.

    `is_own_file` is asked of each file's path, as it is without links.

    A link to a folder is not followed: it could lead back. It becomes a bad row, as does what is no file.
    """
    base = os.path.abspath(where)  # noqa: PTH100  # it leaves no link out, either
    real = os.path.realpath(where)
    folders = [_entries(base)]
    number = 0
    while folders:
        path = next(folders[-1], None)
        if path is None:
            folders.pop()
            continue
        uri = "file://" + quote_from_bytes(os.fsencode(path))
        try:
            if stat.S_ISDIR(path.lstat().st_mode):
                folders.append(_entries(path))
                continue
            if is_own_file(real + str(path)[len(base) :]):
                continue
            found = path.stat()
            problem = (
                None
                if stat.S_ISREG(found.st_mode)
                else "it is no file, and a link to a folder is not followed"
            )
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        if problem:
            yield parser.bad_row(number, uri, problem)
        else:
            yield parser.listed_row(uri, f"{found.st_size}-{found.st_mtime_ns}")
        number += 1


def _entries(folder: str | Path) -> Iterator[Path]:
    return (Path(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith("."))  # noqa: PTH208  # names alone: there may be millions


def list_objects(
    where: str,
    settings: Settings,
    parser: RowParser,
    is_own_file: Callable[[str], bool] = lambda _: False,
    not_a_prefix: Callable[[str], str | None] = lambda _: None,
) -> Iterator[Row]:
    """Every object below an S3 prefix, but those that only stand for folders. Raises InvalidInput.

    `is_own_file` is asked of each key. `not_a_prefix` is asked of an object whose key is the whole prefix,
    and returns why it must not be listed.
    """
    bucket, _, prefix = where[5:].partition("/")
    if not bucket:
        message = "names no bucket: write s3://bucket/prefix."
        raise InvalidInput(message)
    try:
        for one in S3(settings).list_objects(bucket, prefix):
            if one.key == prefix and one.size and (why := not_a_prefix(prefix)):
                raise InvalidInput(why)
            if (one.size or not one.key.endswith("/")) and not is_own_file(one.key):
                yield parser.listed_row(f"s3://{bucket}/{one.key}", one.etag[:VERSION] or None)
    except S3_ERRORS as error:
        message = f"cannot be listed: {describe(error)}"
        raise InvalidInput(message) from error
