"""The files of a list that is a folder, as Spark and Hive write one.

Such a folder has a marker `_SUCCESS`, or `--format` says what its files are. Folders on the way may be named
after the value of a column, as in `day=2031-05-01/`: it is a column of all rows below.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from gradcam_worker.backfill.inputs.files import display_name, on_s3, packed_name
from gradcam_worker.errors import InvalidInput
from gradcam_worker.settings import Settings

SUCCESS = "_SUCCESS"
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
SUFFIXES = {  # of files, by form
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "text": (".txt",),
    "parquet": (".parquet",),
    "orc": (".orc",),
}
PART = "part-"  # how the names of files without a suffix begin


@dataclass(frozen=True)
class Part:
    """A file of a list."""

    where: str
    name: str  # for messages
    constants: Mapping[str, str] = field(default_factory=dict)  # columns with one value in all of its rows


def table_form(where: str, settings: Settings) -> str | None:
    """Return the form of the files of a folder or prefix that is a list; None: it holds images."""
    if not _has_marker(where, settings):
        return None
    suffix = Path(packed_name(next(_names(where, settings), ""))).suffix
    return next((form for form, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def _has_marker(where: str, settings: Settings) -> bool:
    if not on_s3(where):
        return Path(where, SUCCESS).exists()
    bucket, _, prefix = where[5:].partition("/")
    try:
        return (prefix + SUCCESS, 0) in _objects(bucket, prefix + SUCCESS, settings)
    except InvalidInput:  # whoever lists all of it says why it cannot be listed
        return False


def parts_below(where: str, form: str, settings: Settings) -> list[Part]:
    """Return the files below a folder or prefix, in the order of their names.

    Args:
        where: It.
        form: One of `SUFFIXES`.
        settings: For S3.

    Returns:
        Its files.

    Raises:
        InvalidInput: There is none, or it cannot be listed.
    """
    base = where.rstrip("/") + "/"
    parts = [
        Part(base + name, name, _constants(name))
        for name in _names(where, settings)
        if Path(packed_name(name)).suffix in SUFFIXES[form]
        or (not Path(packed_name(name)).suffix and Path(name).name.startswith(PART))
    ]
    if not parts:
        suffixes = " or ".join(SUFFIXES[form])
        message = f"{display_name(where)} is empty: none of its files ends in {suffixes}."
        raise InvalidInput(message)
    return parts


def _constants(name: str) -> dict[str, str]:
    pairs = (folder.partition("=") for folder in name.split("/")[:-1] if "=" in folder)
    return {unquote(key): "" if value == NO_VALUE else unquote(value) for key, _, value in pairs}


def _names(where: str, settings: Settings) -> Iterator[str]:
    """The files below, by their paths from there on, without hidden ones."""
    if on_s3(where):
        bucket, _, prefix = where[5:].partition("/")
        found: Iterator[str] = (
            key[len(prefix) :].lstrip("/") for key, size in _objects(bucket, prefix, settings) if size
        )
    else:
        walked = ((folder, name) for folder, _, names in os.walk(where) for name in names)
        found = iter(sorted(os.path.relpath(os.path.join(*one), where) for one in walked))  # noqa: PTH118
    return (name for name in found if name and not any(part[:1] in {".", "_"} for part in name.split("/")))


def _objects(bucket: str, prefix: str, settings: Settings) -> Iterator[tuple[str, int]]:
    """The keys and sizes of objects. Raises InvalidInput."""
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.s3_errors import S3_ERRORS, describe

    try:
        yield from ((item.key, item.size) for item in S3(settings).list_objects(bucket, prefix))
    except S3_ERRORS as error:
        message = f"{display_name(f's3://{bucket}/{prefix}')} cannot be listed: {describe(error)}"
        raise InvalidInput(message) from error
