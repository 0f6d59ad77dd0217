"""A JSON schema as a generator of what it allows: the part of the language that pydantic writes.

`hypothesis-jsonschema` 0.23 does the same for every schema, but fails on objects with this hypothesis.
"""

from datetime import UTC, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

MANY = 4  # items of a list or an object, where the schema sets no lower limit
ZONES = (UTC, timezone(timedelta(hours=5, minutes=45)))  # RFC 3339 knows no seconds here
LONG = 40  # characters, likewise


def allowed(schema: dict[str, Any], root: dict[str, Any] | None = None) -> st.SearchStrategy[Any]:
    """What this schema allows; `$ref` points into `root`, which is the schema itself unless it is given."""
    root = schema if root is None else root
    if "$ref" in schema:
        return allowed(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for several in ("anyOf", "oneOf"):
        if several in schema and "type" not in schema:  # beside a type they only narrow it
            told_by = schema.get("discriminator", {}).get(
                "propertyName"
            )  # then none of them may leave it out
            return st.one_of([allowed(_with(told_by, one, root), root) for one in schema[several]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return _OF_TYPE[schema["type"]](schema, root)


def _with(name: str | None, schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    if name is None:
        return schema
    whole = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return {**whole, "required": [*whole.get("required", ()), name]}


def _object(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    known = {name: allowed(one, root) for name, one in schema.get("properties", {}).items()}
    needed = {name: known.pop(name) for name in schema.get("required", ())}
    fixed = st.fixed_dictionaries(needed, optional=known)
    more = schema.get("additionalProperties", False)
    if not isinstance(more, dict):
        return fixed
    names = st.text(max_size=LONG)
    return st.dictionaries(names, allowed(more, root), max_size=MANY)


def _array(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    least = schema.get("minItems", 0)
    most = min(schema.get("maxItems", MANY), least + MANY)
    return st.lists(allowed(schema["items"], root), min_size=least, max_size=most)


def _string(schema: dict[str, Any], _: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True).map(lambda text: text.removesuffix("\n"))
    if schema.get("format") == "date-time":
        return st.datetimes(timezones=st.sampled_from(ZONES)).map(lambda moment: moment.isoformat())
    least = schema.get("minLength", 0)
    return st.text(min_size=least, max_size=min(schema.get("maxLength", LONG), least + LONG))


def _number(schema: dict[str, Any], _: dict[str, Any]) -> st.SearchStrategy[Any]:
    return st.floats(
        min_value=schema.get("minimum", schema.get("exclusiveMinimum")),
        max_value=schema.get("maximum", schema.get("exclusiveMaximum")),
        exclude_min="exclusiveMinimum" in schema,
        exclude_max="exclusiveMaximum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )


def _integer(schema: dict[str, Any], _: dict[str, Any]) -> st.SearchStrategy[Any]:
    return st.integers(schema.get("minimum"), schema.get("maximum"))


_OF_TYPE = {
    "object": _object,
    "array": _array,
    "string": _string,
    "number": _number,
    "integer": _integer,
    "boolean": lambda *_: st.booleans(),
    "null": lambda *_: st.none(),
}
