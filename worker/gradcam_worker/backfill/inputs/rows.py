"""What an input says of one image -> a row, or a row with the problem that stands in its way.

Nothing here raises an error: ten thousand bad rows among ten million are ten thousand rows that say why.
"""

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping

from gradcam_worker.errors import DuplicateId, InvalidRow, PermanentError
from gradcam_worker.schemas.model import too_long
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.status import Problem
from gradcam_worker.text.urls import has_credentials, redacted, without_user
from gradcam_worker.text.visible import visible

SHOWN = 1000  # characters of what was received that are kept, where it is no URI
MAX_URI = 2_000_000  # characters: see `gradcam_worker.schemas.shard.Row`
MAX_ID = 256  # characters
SEGMENTS = 2**14  # of the ids' hashes: with ten million ids each holds 600

_UNFIT = r"\x00-\x1f\x7f\ud800-\udfff"  # control characters, and halves of characters
_UNFIT_SIGN = re.compile(f"[{_UNFIT}]")
_FIT = re.compile(
    rf"(?:(?i:s3)://[^/{_UNFIT}]+/|(?i:https?)://[^/{_UNFIT}]|(?i:file)://|(?i:data):)[^{_UNFIT}]+"
)
_RIGHT = {
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
        """`unit`: what a place in the input is the number of."""
        self._unit = unit
        self._ids = Ids()
        self._made = 0

    def listed(self, uri: str, version: str | None) -> Row:
        """A row of what is known to be there: a file, an object. Its name may hold any character."""
        self._made += 1
        return Row(uri=uri, version=version)

    def good(self, place: int, uri: object, own: object = None, sha256: object = None) -> Row:
        """A row of what was said, whatever its type: good where it can be."""
        if (
            type(uri) is not str
            or len(uri) > MAX_URI
            or not _FIT.fullmatch(uri)
            or has_credentials(uri)
            or too_long(uri)
        ):
            return self._row(place, uri, own, sha256, InvalidRow(_why(uri)))
        if own is None and sha256 is None:
            self._made += 1
            return Row(uri=uri)
        return self._row(place, uri, own, sha256, None)

    def bad(self, place: int, received: object, why: str) -> Row:
        """A row of what cannot be read as one: `why` is the rest of a sentence."""
        return self._row(place, received, None, None, InvalidRow(why))

    def _row(self, place: int, uri: object, own: object, sha256: object, error: PermanentError | None) -> Row:
        kept = uri if isinstance(uri, str) and (error is None) else shown(uri)
        name, checksum = _id(own), _checksum(sha256)
        if name is None and own not in (None, ""):
            error = error or InvalidRow(
                f"its id is {_said(own)}: it must be a whole number, or a text of at most {MAX_ID} "
                "printable characters"
            )
        if checksum is None and sha256 not in (None, ""):
            error = error or InvalidRow(f"its sha256 is {_said(sha256)}: it must be 64 hexadecimal digits")
        if name is not None:
            before = self._ids.add(name, self._made)
            if before is not None:
                error = error or DuplicateId(f"its id {name!r} is the id of row {before}, too")
        self._made += 1
        if error is None:
            return Row(uri=kept, id=name, sha256=checksum)
        told = type(error)(f"{self._unit} {place}: {error}")
        problem = Problem.of(told, stage="plan", attempt=0)
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


def shown(received: object) -> str:
    """What was received, as far as it can be shown."""
    if isinstance(received, bytes):
        received = received.strip().decode(errors="backslashreplace")
    text = received if isinstance(received, str) else json.dumps(received, default=str)
    text = without_user(text) if has_credentials(text) else redacted(text)  # before half a URL is cut off
    return visible(text[:SHOWN])[:SHOWN]


def _why(uri: object) -> str:
    """Why this is no URI of an image."""
    if uri is None or (isinstance(uri, str) and not uri.strip()):
        return "it names no image"
    if not isinstance(uri, str):
        return f"its image is {_KINDS.get(type(uri), type(uri).__name__)}: it must be a URI"
    if len(uri) > MAX_URI:
        return f"its URI has {len(uri):,} characters; at most {MAX_URI:,} are allowed"
    if sign := _UNFIT_SIGN.search(uri):
        half = "\ud800" <= sign[0] <= "\udfff"
        return "its URI is not UTF-8" if half else f"its URI holds the control character {sign[0]!r}"
    if _FIT.fullmatch(uri) and has_credentials(uri):
        return f"its URI {without_user(uri)[:100]!r} holds a user or a password, which would be kept"
    return too_long(uri) or _unlike(uri)


def _unlike(uri: str) -> str:
    """What a text that is no URI of ours should look like."""
    scheme, colon, _ = uri.partition(":")
    if not colon or "/" in scheme:
        return f"{uri[:100]!r} is no URI: a path is written as {_RIGHT['file']}, an object as {_RIGHT['s3']}"
    if scheme.casefold() not in _RIGHT:
        return f"its scheme {scheme[:100]!r} is none of {', '.join(_RIGHT)}"
    return f"its URI must look like {_RIGHT[scheme.casefold()]}"


def _id(own: object) -> str | None:
    """An id as a text, or None where it is none, or not fit to be one."""
    name = str(own) if type(own) is int else own
    if isinstance(name, str) and 0 < len(name) <= MAX_ID and not _UNFIT_SIGN.search(name):
        return name
    return None


def _checksum(sha256: object) -> str | None:
    return sha256.lower() if isinstance(sha256, str) and _SHA256.fullmatch(sha256.lower()) else None


def _said(value: object) -> str:
    return _KINDS.get(type(value)) or repr(value)[:80]
