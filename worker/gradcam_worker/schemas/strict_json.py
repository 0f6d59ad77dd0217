"""JSON as RFC 8259 means it, from strangers: nothing that readers disagree on, and nothing without end.

Python's own reader takes NaN, takes the last of two fields of one name, and raises three kinds of errors.
"""

import json
import math
import re
from typing import Any

MAX_DEPTH = 16  # levels of lists and objects, one in another; a job in its message has 7
MAX_DIGITS = 40  # of one number; a float64 is never written with more than 25

_MAYBE_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Unreadable(ValueError):
    """Why something cannot be read, as part of a sentence: `it has 3 bytes`."""


def loads(text: bytes, what: str) -> Any:
    """Read JSON. Raises Unreadable, whose sentence begins with `what`, and no other error.

    Refused are NaN and the infinities, a field that is named twice, more than `MAX_DEPTH` levels, more than
    `MAX_DIGITS` digits, half of a surrogate pair, which no UTF-8 has, and the objects that kombu turns into
    other things than JSON has.
    """
    if _too_deep(text):
        message = f"{what} is nested deeper than {MAX_DEPTH} levels, or its brackets do not match"
        raise Unreadable(message)
    try:
        return _encodable(_DECODER.decode(text.decode()), text)
    except UnicodeEncodeError as error:
        message = (
            f"{what} holds half of a surrogate pair ({error.object[error.start]!a}), which is no character"
        )
        raise Unreadable(message) from None
    except Unreadable as error:
        message = f"{what} {error}"
        raise Unreadable(message) from None
    except UnicodeDecodeError as error:
        message = f"{what} is not UTF-8"
        raise Unreadable(message) from error
    except (ValueError, RecursionError) as error:
        message = f"{what} cannot be read as JSON ({type(error).__name__})"
        raise Unreadable(message) from error


def _encodable(found: Any, text: bytes) -> Any:
    """What was found, where it can be written again. Raises UnicodeEncodeError."""
    if _MAYBE_HALF.search(text):
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _fields(found: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(found)
    if len(names) < len(found):
        message = "names a field twice"
        raise Unreadable(message)
    if "__type__" in names and names.keys() == {"__type__", "__value__"}:
        message = "holds an object that only kombu reads (__type__)"
        raise Unreadable(message)
    return names


def _whole(text: str) -> int:
    _check_digits(text)
    return int(text)


def _broken(text: str) -> float:
    _check_digits(text)
    value = float(text)
    if math.isinf(value):
        message = "holds a number that is larger than any float64"
        raise Unreadable(message)
    return value


def _check_digits(text: str) -> None:
    if len(text) > MAX_DIGITS:
        message = f"holds a number of {len(text):,} digits; at most {MAX_DIGITS} are allowed"
        raise Unreadable(message)


def _constant(name: str) -> None:
    message = f"holds {name}, which is not JSON"
    raise Unreadable(message)


def _too_deep(text: bytes) -> bool:
    """Whether more than MAX_DEPTH brackets are open at once: without recursion, and in linear time."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return False
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(plain.split(b'"')[::2]).translate(_TO_SQUARE, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_fields, parse_int=_whole, parse_float=_broken, parse_constant=_constant
)
