"""Turns the values of one image in an input into a row, or into a row with a problem.

Nothing here raises an error: ten thousand bad rows among ten million become ten thousand rows with a problem.
"""

import json
import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gradcam_worker.backfill.inputs.further import FurtherColumns
from gradcam_worker.errors import DuplicateId, InvalidRow, PermanentError
from gradcam_worker.schemas.model import describe_excess_length
from gradcam_worker.schemas.options import MAX_INPUTS, describe_input_problem
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.status import Problem
from gradcam_worker.text.urls import has_credentials, redacted, without_user
from gradcam_worker.text.visible import visible

MAX_SHOWN = 1000  # characters that are kept of an invalid value
MAX_URI = 2_000_000  # characters: see `gradcam_worker.schemas.shard.Row`
MAX_ID = MAX_VERSION = 256  # characters
SEGMENTS = 2**14  # of the ids' hashes: with ten million ids each has 600
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})

_CONTROL = r"\x00-\x1f\x7f\ud800-\udfff"  # control characters, surrogates
_FORBIDDEN = re.compile(f"[{_CONTROL}]")
_IMAGE_URI = re.compile(
    rf"(?:(?i:s3)://[^/{_CONTROL}]+/|(?i:https?)://[^/{_CONTROL}]|(?i:file)://|(?i:data):)[^{_CONTROL}]+"
)
_EXAMPLES = {
    "s3": "s3://bucket/key",
    "https": "https://host/path",
    "http": "http://host/path",
    "file": "file:///folder/name",
    "data": "data:image/png;base64,...",
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class RowParser:
    """Makes the rows of one input, in its order, and remembers their ids."""

    def __init__(self, unit: str = "Line", further: FurtherColumns | None = None) -> None:
        """Start without rows.

        Args:
            unit: Names what the numbers of the input count, such as Line.
            further: The columns beside image, id, sha256 and inputs.
        """
        self._unit, self.further = unit, further or FurtherColumns()
        self._has_more = not self.further.is_empty
        self.part = ""  # the file of an input of many files, for messages
        self._ids = Ids()
        self._made = 0

    def listed_row(self, uri: str, version: str | None) -> Row:
        """Return the row of a listed file or object, whose name may contain any character."""
        fields = self.further.read(self.place(self._made), uri, None, ())[0] if self._has_more else NO_FIELDS
        self._made += 1
        return Row(uri=uri, version=version, **fields)

    def place(self, number: int) -> str:
        """Return where a row is, for messages."""
        return f"{self._unit} {number} of {self.part}" if self.part else f"{self._unit} {number}"

    def parse(
        self,
        number: int,
        uri: object,
        row_id: object = None,
        sha256: object = None,
        inputs: Mapping[str, object] | None = None,
        values: Sequence[Any] = (),
        fields: Mapping[str, Any] = NO_FIELDS,
    ) -> Row:
        """Return the row of an input's values, of any type; with a problem if they are invalid.

        Args:
            number: Where it is.
            uri: Of its image.
            row_id: Its own id.
            sha256: Of its image.
            inputs: For the network, beside the image; None and empty texts are left out.
            values: Of further columns: see `FurtherColumns.read`.
            fields: Further fields of the row.
        """
        wish: PermanentError | None = None
        if self._has_more:
            kept = uri if isinstance(uri, str) else ""
            given_fields, unclear = self.further.read(
                self.place(number), kept, None if row_id is None else str(row_id), values
            )
            fields = {**given_fields, **fields}
            wish = InvalidRow(unclear) if unclear else None
        if (
            type(uri) is not str
            or len(uri) > MAX_URI
            or not _IMAGE_URI.fullmatch(uri)
            or has_credentials(uri)
            or describe_excess_length(uri)
        ):
            return self._row(number, uri, row_id, sha256, InvalidRow(_uri_problem(uri)), None, fields)
        if row_id is None and sha256 is None and not inputs and not wish:
            self._made += 1
            return Row(uri=uri, **fields)
        given, problem = _valid_inputs(inputs or {})
        error = InvalidRow(problem) if problem else wish
        return self._row(number, uri, row_id, sha256, error, given, fields)

    def bad_row(self, number: int, received: object, reason: str) -> Row:
        """Return the row of something that cannot be read; `reason` completes the sentence "Line 3: ..."."""
        return self._row(number, received, None, None, InvalidRow(reason))

    def _row(
        self,
        number: int,
        uri: object,
        row_id: object,
        sha256: object,
        error: PermanentError | None,
        inputs: dict[str, Any] | None = None,
        fields: Mapping[str, Any] = NO_FIELDS,
    ) -> Row:
        kept = uri if isinstance(uri, str) and (error is None) else displayable(uri)
        name, checksum = _valid_id(row_id), _valid_sha256(sha256)
        if name is None and row_id not in (None, ""):
            error = error or InvalidRow(
                f"its id is {_description(row_id)}: it must be a whole number, or a text of at most {MAX_ID} "
                "printable characters"
            )
        if checksum is None and sha256 not in (None, ""):
            error = error or InvalidRow(
                f"its sha256 is {_description(sha256)}: it must be 64 hexadecimal digits"
            )
        if name is not None:
            before = self._ids.add(name, self._made)
            if before is not None:
                error = error or DuplicateId(f"its id {name!r} is the id of row {before}, too")
        self._made += 1
        if error is None:
            return Row(uri=kept, id=name, sha256=checksum, inputs=inputs, **fields)
        located = type(error)(f"{self.place(number)}: {error}")
        problem = Problem.of(located, stage="plan", attempt=0)
        return Row(uri=kept, id=name, sha256=checksum, inputs=inputs, problem=problem, **fields)


class Ids:
    """The ids of the rows so far, as a hash of 64 bits and the row's number: 13 bytes an id.

    Among ten million ids, two have the same hash once in 400,000 backfills. Python's hash has a random key in
    each process, so nobody can construct collisions.
    """

    def __init__(self) -> None:
        self._hashes = [array("q")] * SEGMENTS  # one, which stays empty, until there are ids
        self._rows = [array("I")] * SEGMENTS

    def add(self, name: str, row: int) -> int | None:
        """Add a row's id; return the number of the earlier row with the same id, if any."""
        value = hash(name)
        segment = value % SEGMENTS
        hashes = self._hashes[segment]
        index = bisect_left(hashes, value)
        if index < len(hashes) and hashes[index] == value:
            return self._rows[segment][index]
        if not hashes:
            hashes = self._hashes[segment] = array("q")
            self._rows[segment] = array("I")
        hashes.insert(index, value)
        self._rows[segment].insert(index, row)
        return None


def displayable(received: object) -> str:
    """Return a received value as printable text of limited length, without secrets."""
    if isinstance(received, bytes):
        received = received.strip().decode(errors="backslashreplace")
    text = received if isinstance(received, str) else json.dumps(received, default=str)
    text = without_user(text) if has_credentials(text) else redacted(text)  # before a URL is cut off
    return visible(text[:MAX_SHOWN])[:MAX_SHOWN]


def _uri_problem(uri: object) -> str:
    """What is wrong with the URI of an image."""
    if uri is None or (isinstance(uri, str) and not uri.strip()):
        return "it names no image"
    if not isinstance(uri, str):
        return f"its image is {_KINDS.get(type(uri), type(uri).__name__)}: it must be a URI"
    if len(uri) > MAX_URI:
        return f"its URI has {len(uri):,} characters; at most {MAX_URI:,} are allowed"
    if match := _FORBIDDEN.search(uri):
        is_surrogate = "\ud800" <= match[0] <= "\udfff"
        return "its URI is not UTF-8" if is_surrogate else f"its URI holds the control character {match[0]!r}"
    if _IMAGE_URI.fullmatch(uri) and has_credentials(uri):
        return f"its URI {without_user(uri)[:100]!r} holds a user or a password, which would be kept"
    return describe_excess_length(uri) or _scheme_problem(uri)


def _scheme_problem(uri: str) -> str:
    """What is wrong with the scheme of a URI, or what a URI with this scheme looks like."""
    scheme, colon, _ = uri.partition(":")
    if not colon or "/" in scheme:
        path, key = _EXAMPLES["file"], _EXAMPLES["s3"]
        return f"{uri[:100]!r} is no URI: a path is written as {path}, an object as {key}"
    if scheme.casefold() not in _EXAMPLES:
        return f"its scheme {scheme[:100]!r} is none of {', '.join(_EXAMPLES)}"
    return f"its URI must look like {_EXAMPLES[scheme.casefold()]}"


def _valid_inputs(inputs: Mapping[str, object]) -> tuple[dict[str, Any] | None, str | None]:
    """The values that are there, and what is wrong with one of them, if so."""
    if len(inputs) > MAX_INPUTS:
        return None, f"it has {len(inputs)} inputs for the network; at most {MAX_INPUTS} are allowed"
    given: dict[str, Any] = {}
    for name, value in inputs.items():
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue  # tables write a missing number as NaN
        one = str(value).lower() if isinstance(value, bool) else value
        if not 0 < len(name) <= MAX_ID:
            return None, f"its input {name[:40]!r} must have a name of at most {MAX_ID} characters"
        if problem := describe_input_problem(one):
            return None, f"its input {name!r}: {problem}"
        given[name] = one
    return given or None, None


def _valid_id(row_id: object) -> str | None:
    """An id as text, or None if there is none or it is invalid."""
    name = str(row_id) if type(row_id) is int else row_id
    if isinstance(name, str) and 0 < len(name) <= MAX_ID and not _FORBIDDEN.search(name):
        return name
    return None


def _valid_sha256(sha256: object) -> str | None:
    return sha256.lower() if isinstance(sha256, str) and _SHA256.fullmatch(sha256.lower()) else None


def _description(value: object) -> str:
    return _KINDS.get(type(value)) or repr(value)[:80]
