"""Every file below a folder, every object below an S3 prefix: rows with what tells one content from the next.

Nothing is looked into: what is no image is told by the worker that reads it.
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
from gradcam_worker.storage.s3_errors import FAILED, reason

VERSION = 256  # characters: see `gradcam_worker.schemas.shard.Row`


def files(where: str, parser: RowParser, left_out: Callable[[str], bool] = lambda _: False) -> Iterator[Row]:
    """Every file, in the order of names, folder by folder; none that is hidden, and of folders none either.

    `left_out` is asked of each file's path, as it is without links.

    A link to a folder is not followed: it could lead back. It becomes a bad row, as does what is no file.
    """
    base = os.path.abspath(where)  # noqa: PTH100  # it leaves no link out, either
    real = os.path.realpath(where)
    walked = [_entries(base)]
    number = 0
    while walked:
        path = next(walked[-1], None)
        if path is None:
            walked.pop()
            continue
        uri = "file://" + quote_from_bytes(os.fsencode(path))
        try:
            if stat.S_ISDIR(path.lstat().st_mode):
                walked.append(_entries(path))
                continue
            if left_out(real + str(path)[len(base) :]):
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
            yield parser.bad(number, uri, problem)
        else:
            yield parser.listed(uri, f"{found.st_size}-{found.st_mtime_ns}")
        number += 1


def _entries(folder: str | Path) -> Iterator[Path]:
    return (Path(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith("."))  # noqa: PTH208  # names alone: there may be millions


def objects(
    where: str,
    settings: Settings,
    parser: RowParser,
    left_out: Callable[[str], bool] = lambda _: False,
    alone: Callable[[str], str | None] = lambda _: None,
) -> Iterator[Row]:
    """Every object below an S3 prefix, but those that only stand for folders. Raises InvalidInput.

    `left_out` is asked of each key; `alone`, of an object that is no prefix of others, what it is instead.
    """
    bucket, _, prefix = where[5:].partition("/")
    if not bucket:
        message = "names no bucket: write s3://bucket/prefix."
        raise InvalidInput(message)
    try:
        for one in S3(settings).listed(bucket, prefix):
            if one.key == prefix and one.size and (why := alone(prefix)):
                raise InvalidInput(why)
            if (one.size or not one.key.endswith("/")) and not left_out(one.key):
                yield parser.listed(f"s3://{bucket}/{one.key}", one.etag[:VERSION] or None)
    except FAILED as error:
        message = f"cannot be listed: {reason(error)}"
        raise InvalidInput(message) from error
