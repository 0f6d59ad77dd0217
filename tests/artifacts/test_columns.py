from typing import Any

import pyarrow as pa
import pytest

from gradcam_worker.artifacts.columns import arrow_type, carried_array
from gradcam_worker.errors import InvalidInput

TYPES = [
    pa.int64(),
    pa.float16(),
    pa.float64(),
    pa.string(),
    pa.bool_(),
    pa.timestamp("ns", "Europe/Berlin"),
    pa.timestamp("us"),
    pa.date32(),
    pa.date64(),
    pa.time32("ms"),
    pa.time64("us"),
    pa.duration("s"),
    pa.decimal128(10, 2),
    pa.list_(pa.field("item", pa.int8(), nullable=False)),
    pa.list_(pa.float32(), 4),
    pa.struct([("a", pa.int32()), ("b", pa.list_(pa.struct([("c", pa.decimal128(4, 1))])))]),
    pa.map_(pa.string(), pa.int64()),
    pa.binary(),
    pa.binary(4),
    pa.null(),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_type_is_read_from_its_text(kind: pa.DataType) -> None:
    assert arrow_type(str(kind)).equals(kind)


def test_a_dictionary_is_read_as_the_type_of_its_values() -> None:
    assert arrow_type(str(pa.dictionary(pa.int8(), pa.string()))) == pa.string()


@pytest.mark.parametrize("text", ["", "varchar", "list<item: >", "struct<>x", "decimal128(99, 1)"])
def test_what_is_no_type_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no type of a column that can be carried"):
        arrow_type(text)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("int64", [1, None, "7", 2**70, 1.5], [1, None, None, None, None]),
        ("double", [1, None, "nan", "x"], [1.0, None, "nan", None]),
        ("string", ["a", 1], ["a", None]),
        ("bool", [True, 1], [True, None]),
        ("decimal128(10, 2)", ["12.50", "x"], ["12.50", None]),
        ("date32[day]", ["2031-02-03", "2031-02-30"], ["2031-02-03", None]),
        ("timestamp[us, tz=UTC]", ["2031-02-03T04:05:06Z"], ["2031-02-03 04:05:06+00:00"]),
        ("time32[s]", ["04:05:06", "x"], ["04:05:06", None]),
        ("list<item: string>", [["a", None], None], [["a", None], None]),
        ("struct<a: int32>", [{"a": 1}], [{"a": 1}]),
        ("binary", ["YWI=", "?"], [b"ab", None]),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_null(
    kind: str, values: list[Any], expected: list[Any]
) -> None:
    found = carried_array(values, arrow_type(kind)).to_pylist()
    plain = (type(None), int, float, list, dict, bytes, str)
    told = [one if isinstance(one, plain) else str(one) for one in found]
    assert [one if one == one else "nan" for one in told] == expected  # noqa: PLR0124  # nan
