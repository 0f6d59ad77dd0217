"""Base classes of the models on the wire, and sentences about what is wrong with a document."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

MAX_KEY_BYTES = 1024  # of an S3 key: S3's own limit
MAX_URI_BYTES = 8192  # of any other URI: most servers read less
# A URL, image data, a webhook secret, a user with a password: not shown in messages.
MAYBE_SECRET = re.compile(r"://|^data:|whsec_|:[^\s@]*@", re.IGNORECASE)


class RequestModel(BaseModel):
    """The base of documents that workers receive: immutable; unknown fields are refused."""

    # hide_input_in_errors: a traceback shows pydantic's message, and the input may contain secrets.
    model_config = ConfigDict(
        frozen=True, extra="forbid", serialize_by_alias=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    def to_json(self) -> str:
        """Serialize as JSON. Equal models have equal texts, but for a method that was not named."""
        return self.model_dump_json()


class ResponseModel(RequestModel):
    """The base of documents that workers write. Unknown fields are ignored: a later version may add some."""

    model_config = ConfigDict(extra="ignore")


def without_defaults(model: BaseModel, fields: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Leave fields with their defaults out of a request: workers of earlier versions refuse unknown fields.

    Args:
        model: The request.
        fields: What it was serialized to.
        names: Fields that were added after the first release.

    Returns:
        `fields` without these where they have their defaults.
    """
    for name in names:
        if getattr(model, name) == _default_of(type(model), name):
            fields.pop(name, None)
    return fields


@cache  # pydantic inspects the signature of a default's factory each time
def _default_of(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].get_default(call_default_factory=True)


def describe_excess_length(uri: str) -> str | None:
    """Describe how a URI is too long, in bytes of UTF-8.

    Args:
        uri: The URI. The length of a data: URI is limited by a setting instead.

    Returns:
        A sentence; None if the URI is not too long.
    """
    if len(uri) * 4 <= MAX_KEY_BYTES:  # short enough in any case: a character has at most four bytes
        return None
    scheme, _, rest = uri.partition(":")
    scheme = scheme.casefold()
    if scheme == "data":
        return None
    size = _utf8_bytes(uri)
    if size > MAX_URI_BYTES:
        return f"its URI has {size:,} bytes; at most {MAX_URI_BYTES:,} are allowed"
    size = _utf8_bytes(rest.removeprefix("//").partition("/")[2]) if scheme == "s3" else 0
    if size > MAX_KEY_BYTES:
        return f"its S3 key has {size:,} bytes; at most {MAX_KEY_BYTES:,} are allowed"
    return None


def _utf8_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


AN_OBJECT, A_LIST = "an object, a table of fields", "a list"
KINDS = {"model_type": AN_OBJECT, "model_attributes_type": AN_OBJECT, "dict_type": AN_OBJECT}
KINDS |= {"tuple_type": A_LIST, "list_type": A_LIST}
EXAMPLES = {  # of fields of a job
    "target": '{"top_n": 3}',
    "method": '{"name": "rise"}',
    "artifacts": '[{"kind": "overlay"}]',
    "metrics": '["deletion"]',
    "inputs": '{"age": 61}',
    "annotations": '{"labels": ["tabby"]}',
}


def describe(error: ValidationError) -> str:
    """Describe errors of pydantic in one sentence: `target.top_n: Input should be ... (received 0)`.

    The received value is shown only if it is a short text or number without the look of a secret, in a field
    that the model has.

    Args:
        error: The error.

    Returns:
        The sentence, at most 2000 characters.
    """
    findings = (
        f"{_show_path(location) or 'the message'}: {problem}" for location, problem in describe_each(error)
    )
    return "; ".join(findings)[:2000]


def describe_each(error: ValidationError) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Describe errors of pydantic one by one.

    Args:
        error: The error.

    Yields:
        The location of a field, and what is wrong with it, as in `describe`.
    """
    errors = error.errors(include_url=False)
    for detail in errors[:8]:
        location = detail["loc"]
        inner = [other["loc"] for other in errors if len(other["loc"]) > len(location)]
        if location in {other[: len(location)] for other in inner}:
            continue  # a consequence of an error inside this field
        problem = re.sub("^Value error, ", "", detail["msg"])
        received, plain = detail["input"], isinstance(detail["input"], str | int | float | None)
        if detail["type"] in KINDS:
            example = EXAMPLES.get(re.sub(r"\.\d+$", "", _show_path(location)))
            problem = f"must be {KINDS[detail['type']]}" + (f", as in {example}" if example else "")
        elif detail["type"] == "too_short":
            problem = f"needs {detail['ctx']['min_length']} or more entries"
        elif detail["type"] == "union_tag_invalid":
            told = detail["ctx"]
            kind = told["discriminator"].strip("'")
            problem = f"{kind} is {told['tag'][:60]!r}, which is none of {told['expected_tags']}"
        if detail["type"] == "extra_forbidden":
            problem, plain = "unknown field", False
        elif detail["type"] == "missing" or MAYBE_SECRET.search(str(received)[:2000]):
            plain = False
        shown = f" (received {repr(received)[:60]})" if plain else ""
        yield location, f"{problem}{shown}"


def _show_path(location: tuple[int | str, ...]) -> str:
    return ".".join(_show_name(step) if isinstance(step, str) else str(step) for step in location)


def _show_name(name: str) -> str:
    """The name of a field; an unknown field's name is untrusted."""
    return "..." if MAYBE_SECRET.search(name[:2000]) else repr(name)[1:-1][:60]


WEBHOOK_SECRET_PREFIX = "whsec_"  # noqa: S105  # the prefix of all secrets
