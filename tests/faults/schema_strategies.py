"""A JSON schema as a generator of what it allows: the part of the language that pydantic writes.

`hypothesis-jsonschema` 0.23 does the same for every schema, but fails on objects with this hypothesis.
"""

from collections.abc import Callable
from datetime import UTC, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

MANY = 4  # items of a list or an object, where the schema sets no lower limit
ZONES = (UTC, timezone(timedelta(hours=5, minutes=45)))  # RFC 3339 knows no seconds here
LONG = 40  # characters, likewise

Schema = dict[str, Any]
Strategy = st.SearchStrategy[Any]


def allowed(schema: Schema, root: Schema | None = None) -> Strategy:
    """What this schema allows; `$ref` points into `root`, which is the schema itself unless it is given."""
    root = schema if root is None else root
    if "$ref" in schema:
        return allowed(_definition(schema, root), root)
    variants = schema.get("anyOf") or schema.get("oneOf")
    if variants and "type" not in schema:  # beside a type they only narrow it
        if "discriminator" in schema:  # then none of them may leave it out
            name = schema["discriminator"]["propertyName"]
            objects = [_definition(variant, root) for variant in variants]
            variants = [{**variant, "required": [*variant.get("required", ()), name]} for variant in objects]
        return st.one_of([allowed(variant, root) for variant in variants])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return OF_TYPE[schema["type"]](schema, root)


def _definition(schema: Schema, root: Schema) -> Schema:
    definition: Schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return definition


def _object(schema: Schema, root: Schema) -> Strategy:
    properties = {name: allowed(value, root) for name, value in schema.get("properties", {}).items()}
    required = {name: properties.pop(name) for name in schema.get("required", ())}
    more = schema.get("additionalProperties", False)
    if not isinstance(more, dict):
        return st.fixed_dictionaries(required, optional=properties)
    return st.dictionaries(st.text(max_size=LONG), allowed(more, root), max_size=MANY)


def _array(schema: Schema, root: Schema) -> Strategy:
    if "prefixItems" in schema:  # of a fixed length: pydantic says so with minItems and maxItems
        return st.tuples(*(allowed(item, root) for item in schema["prefixItems"])).map(list)
    least = schema.get("minItems", 0)
    most = min(schema.get("maxItems", MANY), least + MANY)
    return st.lists(allowed(schema["items"], root), min_size=least, max_size=most)


def _string(schema: Schema, _: Schema) -> Strategy:
    if "pattern" in schema:
        pattern: str = schema["pattern"]
        return st.from_regex(pattern, fullmatch=True).map(lambda text: text.removesuffix("\n"))
    if schema.get("format") == "date-time":
        return st.datetimes(timezones=st.sampled_from(ZONES)).map(lambda moment: moment.isoformat())
    least = schema.get("minLength", 0)
    return st.text(min_size=least, max_size=min(schema.get("maxLength", LONG), least + LONG))


def _number(schema: Schema, _: Schema) -> Strategy:
    lower, upper = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    return st.floats(
        min_value=schema.get("minimum", lower),
        max_value=schema.get("maximum", upper),
        exclude_min=lower is not None,
        exclude_max=upper is not None,
        allow_nan=False,
        allow_infinity=False,
    )


OF_TYPE: dict[str, Callable[[Schema, Schema], Strategy]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "number": _number,
    "integer": lambda schema, _: st.integers(schema.get("minimum"), schema.get("maximum")),
    "boolean": lambda _, __: st.booleans(),
    "null": lambda _, __: st.none(),
}
