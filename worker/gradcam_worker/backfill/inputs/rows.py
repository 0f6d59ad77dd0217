"""Turns what an input says of one image into a row, or into a row with a problem.

Nothing here raises an error: ten thousand bad rows among ten million become ten thousand rows with a problem.
"""

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping

from gradcam_worker.errors import DuplicateId, InvalidRow, PermanentError
from gradcam_worker.schemas.model import describe_excess_length
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.status import Problem
from gradcam_worker.text.urls import has_credentials, redacted, without_user
from gradcam_worker.text.visible import visible

MAX_SHOWN = 1000  # characters of what was received that are kept, where it is no URI
MAX_URI = 2_000_000  # characters: see `gradcam_worker.schemas.shard.Row`
MAX_ID = 256  # characters
SEGMENTS = 2**14  # of the ids' hashes: with ten million ids each holds 600

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

    def __init__(self, unit: str = "Line") -> None:
        """`unit`: what the numbers of places in the input count."""
        self._unit = unit
        self._ids = Ids()
        self._made = 0

    def listed_row(self, uri: str, version: str | None) -> Row:
        """A row of a file or an object that was listed. Its name may hold any character."""
        self._made += 1
        return Row(uri=uri, version=version)

    def parse(self, place: int, uri: object, row_id: object = None, sha256: object = None) -> Row:
        """A row of the values in an input, of any type; with a problem where they are wrong."""
        if (
            type(uri) is not str
            or len(uri) > MAX_URI
            or not _IMAGE_URI.fullmatch(uri)
            or has_credentials(uri)
            or describe_excess_length(uri)
        ):
            return self._row(place, uri, row_id, sha256, InvalidRow(_uri_problem(uri)))
        if row_id is None and sha256 is None:
            self._made += 1
            return Row(uri=uri)
        return self._row(place, uri, row_id, sha256, None)

    def bad_row(self, place: int, received: object, why: str) -> Row:
        """A row of what cannot be read; `why` is the rest of a sentence."""
        return self._row(place, received, None, None, InvalidRow(why))

    def _row(
        self, place: int, uri: object, row_id: object, sha256: object, error: PermanentError | None
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
            return Row(uri=kept, id=name, sha256=checksum)
        located = type(error)(f"{self._unit} {place}: {error}")
        problem = Problem.of(located, stage="plan", attempt=0)
        return Row(uri=kept, id=name, sha256=checksum, problem=problem)


class Ids:
    """The ids of the rows so far, as 64 bits of each and the row's number: 13 bytes an id.

    Two of ten million ids are taken for the same one once in 400,000 backfills. Python's own hash is keyed
    anew in each process, so that nobody can choose ids that it takes for the same.
    """

    def __init__(self) -> None:
        self._hashes: list[array[int]] = []
        self._rows: list[array[int]] = []

    def add(self, name: str, row: int) -> int | None:
        """Remember a row's id; the number of the row that had it before, if one had."""
        if not self._hashes:
            self._hashes = [array("q") for _ in range(SEGMENTS)]
            self._rows = [array("I") for _ in range(SEGMENTS)]
        value = hash(name)
        segment = value % SEGMENTS
        hashes = self._hashes[segment]
        place = bisect_left(hashes, value)
        if place < len(hashes) and hashes[place] == value:
            return self._rows[segment][place]
        hashes.insert(place, value)
        self._rows[segment].insert(place, row)
        return None


def displayable(received: object) -> str:
    """What was received, as far as it can be shown."""
    if isinstance(received, bytes):
        received = received.strip().decode(errors="backslashreplace")
    text = received if isinstance(received, str) else json.dumps(received, default=str)
    text = without_user(text) if has_credentials(text) else redacted(text)  # before half a URL is cut off
    return visible(text[:MAX_SHOWN])[:MAX_SHOWN]


def _uri_problem(uri: object) -> str:
    """Why this is no URI of an image."""
    if uri is None or (isinstance(uri, str) and not uri.strip()):
        return "it names no image"
    if not isinstance(uri, str):
        return f"its image is {_KINDS.get(type(uri), type(uri).__name__)}: it must be a URI"
    if len(uri) > MAX_URI:
        return f"its URI has {len(uri):,} characters; at most {MAX_URI:,} are allowed"
    if sign := _FORBIDDEN.search(uri):
        half = "\ud800" <= sign[0] <= "\udfff"
        return "its URI is not UTF-8" if half else f"its URI holds the control character {sign[0]!r}"
    if _IMAGE_URI.fullmatch(uri) and has_credentials(uri):
        return f"its URI {without_user(uri)[:100]!r} holds a user or a password, which would be kept"
    return describe_excess_length(uri) or _scheme_problem(uri)


def _scheme_problem(uri: str) -> str:
    """How a URI that has no right scheme should look."""
    scheme, colon, _ = uri.partition(":")
    if not colon or "/" in scheme:
        path, key = _EXAMPLES["file"], _EXAMPLES["s3"]
        return f"{uri[:100]!r} is no URI: a path is written as {path}, an object as {key}"
    if scheme.casefold() not in _EXAMPLES:
        return f"its scheme {scheme[:100]!r} is none of {', '.join(_EXAMPLES)}"
    return f"its URI must look like {_EXAMPLES[scheme.casefold()]}"


def _valid_id(row_id: object) -> str | None:
    """An id as a text, or None where it is none, or not fit to be one."""
    name = str(row_id) if type(row_id) is int else row_id
    if isinstance(name, str) and 0 < len(name) <= MAX_ID and not _FORBIDDEN.search(name):
        return name
    return None


def _valid_sha256(sha256: object) -> str | None:
    return sha256.lower() if isinstance(sha256, str) and _SHA256.fullmatch(sha256.lower()) else None


def _description(value: object) -> str:
    return _KINDS.get(type(value)) or repr(value)[:80]
