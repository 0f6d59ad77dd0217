"""Reads S3 inventories: lists of a bucket's objects, in CSV, Parquet or ORC, with or without versions.

A `manifest.json` names the files of an inventory and their columns. CSV without it has bucket and key, and,
where the fourth and fifth field are true or false, version, is latest, is delete marker. Only the latest
version of an object is a row.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_plus

from gradcam_worker.backfill.inputs.arrow_tables import (
    ArrowFile,
    carried_values,
    kind_of,
    plain_values,
    told_as_damage,
)
from gradcam_worker.backfill.inputs.files import on_s3
from gradcam_worker.backfill.inputs.filters import OUTDATED, NameFilter
from gradcam_worker.backfill.inputs.further import TEXT, Kinds
from gradcam_worker.backfill.inputs.rows import MAX_VERSION, RowParser
from gradcam_worker.backfill.inputs.tables import csv_records, without_unreadable
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.text.visible import visible

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
FORMATS = {"csv": "csv", "parquet": "parquet", "orc": "orc"}  # as a manifest names them, in any case
BUCKET, KEY, VERSION, LATEST, DELETED, ETAG = (
    *("bucket", "key", "versionid", "islatest", "isdeletemarker", "etag"),
)
SPECIAL = {BUCKET, KEY, VERSION, LATEST, DELETED, ETAG}
WITH_VERSIONS = (BUCKET, KEY, VERSION, LATEST, DELETED)
TRUTHS = {"true", "false"}


@dataclass(frozen=True)
class Manifest:
    """What an inventory's manifest says."""

    form: str  # csv, parquet or orc
    names: tuple[str, ...]  # of columns; empty: the files say it
    files: tuple[str, ...]  # paths, or s3://bucket/key


def read_manifest(where: str, data: bytes) -> Manifest:
    """Read a manifest.

    Args:
        where: Its path, or its URI.
        data: Its content.

    Returns:
        What it says. Of a manifest on this machine, files are looked for beside it.

    Raises:
        InvalidInput: It is no manifest of an inventory; the message begins with the verb.
    """
    try:
        manifest = json.loads(data)
        form = FORMATS[manifest["fileFormat"].casefold()]
        bucket = manifest["destinationBucket"].removeprefix("arn:aws:s3:::")
        keys = [str(one["key"]) for one in manifest["files"]]
        schema = str(manifest.get("fileSchema", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = (
            f"is no manifest of an S3 inventory ({type(error).__name__}: {error}): it has fileFormat (CSV, "
            "Parquet or ORC), fileSchema, destinationBucket, and files with a key each. For JSON Lines say "
            "--format jsonl."
        )
        raise InvalidInput(message) from error
    names = tuple(name.strip() for name in schema.split(",")) if form == "csv" else ()
    if form == "csv" and not {BUCKET, KEY} <= {*map(canonical, names)}:
        message = f"has the fileSchema {schema[:200]!r}, without Bucket and Key."
        raise InvalidInput(message)
    if on_s3(where):
        return Manifest(form, names, tuple(f"s3://{bucket}/{key}" for key in keys))
    return Manifest(form, names, tuple(_beside(Path(where).parent, key) for key in keys))


def _beside(folder: Path, key: str) -> str:
    """The file of a manifest that was copied to this machine. Raises InvalidInput if it is not there."""
    name = key.rpartition("/")[2]
    places = (folder / name, folder / "data" / name, folder.parent / "data" / name)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        message = f"names {name!r}, which is neither beside it, nor in data, nor in ../data."
        raise InvalidInput(message)
    return str(found)


def canonical(name: str) -> str:
    """`VersionId` or `version_id` -> `versionid`."""
    return name.replace("_", "").casefold()


class InventoryReader:
    """Reads the objects of an inventory's files."""

    def __init__(self, form: str, names: Sequence[str], names_filter: NameFilter) -> None:
        """Prepare to read.

        Args:
            form: csv, parquet or orc.
            names: Of the columns of CSV; empty: bucket and key, perhaps versions.
            names_filter: Leaves objects out.
        """
        self._form, self._names, self._filter = form, tuple(names), names_filter

    def kinds(self, file: BinaryIO, constants: Mapping[str, str]) -> Kinds:
        """Return the columns and their types, without those of the object's name. Raises InvalidInput."""
        if self._form == "csv":
            found = [(name, TEXT) for name in self._names]
        else:
            found = [(one.name, kind_of(one.type)) for one in ArrowFile(file, self._form).schema]
            if not {BUCKET, KEY} <= {canonical(name) for name, _ in found}:
                names = ", ".join(name for name, _ in found)[:300]
                message = f"has the columns {names}: it must have bucket and key."
                raise InvalidInput(message)
        return [*found, *((name, TEXT) for name in constants)]

    def used(self, names: Sequence[str]) -> set[str]:
        """Return the columns that mean something to us."""
        return {name for name in names if canonical(name) in SPECIAL}

    def rows(self, file: BinaryIO, parser: RowParser, constants: Mapping[str, str]) -> Iterator[Row]:  # noqa: ARG002
        """Read the rows. Raises InvalidInput if the file is damaged."""
        return self._csv_rows(file, parser) if self._form == "csv" else self._arrow_rows(file, parser)

    def _csv_rows(self, file: BinaryIO, parser: RowParser) -> Iterator[Row]:
        names = [canonical(name) for name in self._names]
        carried = [self._names.index(name) for name in parser.further.carried]
        for record in csv_records(file, parser, ","):
            if isinstance(record, Row):
                yield record
                continue
            number, fields = record
            if not names:
                names = [*WITH_VERSIONS] if fields[3:4] and TRUTHS.issuperset(fields[3:5]) else [BUCKET, KEY]
            given = dict(zip(names, fields, strict=False))
            bucket, key = given.get(BUCKET, ""), given.get(KEY, "")
            if not bucket or not key or "/" in bucket or len(fields) < len(self._names):
                expected = (
                    f"have the {len(names)} fields {', '.join(names)}"
                    if carried
                    else "begin with a bucket, a comma and a key"
                )
                yield parser.bad_row(number, ",".join(fields), f"it must {expected}")
                continue
            given[KEY] = unquote_plus(key, errors="surrogateescape")
            values: Sequence[Any] = [fields[position] or None for position in carried]
            values = without_unreadable(parser.further, parser.place(number), values)
            if row := self._row(parser, number, given, values):
                yield row

    def _arrow_rows(self, file: BinaryIO, parser: RowParser) -> Iterator[Row]:
        opened, further, number = ArrowFile(file, self._form), parser.further, 0
        special = {canonical(name): name for name in opened.schema.names if canonical(name) in SPECIAL}
        wanted = [*special.values(), *further.carried]
        with told_as_damage(lambda: number):
            for batch in opened.batches(wanted):
                cells = [plain_values(batch.column(name)) for name in special.values()]
                own_names = {name: name for name in further.carried}
                more = carried_values(batch, further, {}, own_names, parser, number)
                values = zip(*more, strict=True) if more else iter([()] * len(batch))
                for given, one in zip(zip(*cells, strict=True), values, strict=True):
                    if row := self._row(parser, number, dict(zip(special, given, strict=True)), one):
                        yield row
                    number += 1

    def _row(
        self, parser: RowParser, number: int, given: Mapping[str, Any], values: Sequence[Any]
    ) -> Row | None:
        """The row of an object; None: it is left out."""
        if str(given.get(LATEST, True)).casefold() == "false" or str(given.get(DELETED)).casefold() == "true":
            self._filter.skipped[OUTDATED] += 1
            return None
        bucket, key = str(given[BUCKET] or ""), str(given[KEY] or "")
        if key.endswith("/") or self._filter.skips(key, f"{bucket}/{key}"):
            return None
        version = visible(str(given.get(ETAG) or given.get(VERSION) or "").strip('"'))[:MAX_VERSION]
        fields = {"version": version} if version else {}
        return parser.parse(number, f"s3://{bucket}/{key}", values=values, fields=fields)
