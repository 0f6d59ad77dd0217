"""Strict reading of untrusted JSON (RFC 8259): with limits, and without what parsers interpret differently.

Python's parser accepts NaN and duplicate fields, and raises several kinds of errors.
"""

import json
import math
import re
from typing import Any

MAX_DEPTH = 16  # nested lists and objects; a job in its message has 7
MAX_DIGITS = 40  # of one number; a float64 has at most 25

_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Unreadable(ValueError):
    """Why a text cannot be read, as part of a sentence, such as `it is not UTF-8`."""


def loads(text: bytes, what: str) -> Any:
    """Parse JSON.

    Refused are NaN and the infinities, duplicate fields, more than `MAX_DEPTH` levels, more than `MAX_DIGITS`
    digits, unpaired surrogates, and the objects that kombu converts to other Python types.

    Args:
        text: The JSON text, in UTF-8.
        what: The subject of the error's sentence.

    Returns:
        The decoded data.

    Raises:
        Unreadable: The text is refused. No other error is raised.
    """
    if _is_too_deep(text):
        message = f"{what} is nested deeper than {MAX_DEPTH} levels, or its brackets do not match"
        raise Unreadable(message)
    try:
        return _check_surrogates(_DECODER.decode(text.decode()), text)
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


def _check_surrogates(data: Any, text: bytes) -> Any:
    """Return the data; raise UnicodeEncodeError if it contains an unpaired surrogate."""
    if _MAYBE_SURROGATE.search(text):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        message = "names a field twice"
        raise Unreadable(message)
    if "__type__" in names and names.keys() == {"__type__", "__value__"}:
        message = "holds an object that only kombu reads (__type__)"
        raise Unreadable(message)
    return names


def _parse_int(text: str) -> int:
    _check_digits(text)
    return int(text)


def _parse_float(text: str) -> float:
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


def _refuse_constant(name: str) -> None:
    message = f"holds {name}, which is not JSON"
    raise Unreadable(message)


def _is_too_deep(text: bytes) -> bool:
    """Whether brackets are nested deeper than MAX_DEPTH. It takes linear time, and does not recurse."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return False
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(plain.split(b'"')[::2]).translate(_TO_SQUARE, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_make_object,
    parse_int=_parse_int,
    parse_float=_parse_float,
    parse_constant=_refuse_constant,
)
