"""Values of a network's further inputs: what is taken, what is refused, and the numbers that they become."""

import re
from typing import Any

import pytest

from gradcam_worker.errors import InvalidNetworkInput
from gradcam_worker.gradcam.network_inputs import NetworkInput, as_given, encode, resolve, samples

AGE = NetworkInput("age", minimum=0, maximum=120, scale=0.01, offset=-0.5)
SEX = NetworkInput("sex", "category", values=("f", "m", "x"), default="x")
SITE = NetworkInput("site", "category", values=("0", "1"), encoding="index")
COUNT = NetworkInput("count", "integer", minimum=1)
BLOOD = NetworkInput("blood", shape=(3,), default=(1.0, 2.0, 3.0))
CAMERA = NetworkInput("camera", default=4.0, constant=True)
ALL = (AGE, SEX, SITE, COUNT, BLOOD, CAMERA)
LEAST = {"age": 61, "site": 1, "count": 2}


def test_values_become_one_row_of_numbers_in_the_order_of_the_registry() -> None:
    values = resolve(ALL, {"count": 2, "site": 1, "sex": "m", "age": 61, "blood": [4, 5.5, 6]}, "moles")
    assert encode(ALL, values) == pytest.approx((0.11, 0, 1, 0, 1, 2, 4, 5.5, 6, 4))
    assert sum(one.width for one in ALL) == 10


def test_what_is_not_given_is_the_default_or_constant() -> None:
    values = resolve(ALL, LEAST, "moles")
    assert {name: as_given(value) for name, value in values.items()} == {
        **LEAST,
        "site": "1",
        "sex": "x",
        "blood": (1, 2, 3),
        "camera": 4,
    }


def test_a_default_that_is_an_integer_is_shown_as_it_is() -> None:
    """An int of Python 3.11 has no `is_integer`."""
    age, blood = NetworkInput("age", default=61), NetworkInput("blood", shape=(2,), default=(1, 2.5))
    values = resolve((age, blood), {}, "moles")
    assert {name: as_given(value) for name, value in values.items()} == {"age": 61, "blood": (1, 2.5)}
    assert age.describe() == "age (number, default 61)"


@pytest.mark.parametrize("given", [61, 61.0, "61", " 61.0 "])
def test_a_number_may_be_a_text_as_in_a_table(given: Any) -> None:
    assert resolve((AGE,), {"age": given}, "moles") == {"age": 61}


@pytest.mark.parametrize("given", [1, 1.0, "1"])
def test_a_category_may_be_a_number(given: Any) -> None:
    assert resolve((SITE,), {"site": given}, "moles") == {"site": "1"}


def test_numbers_of_a_text_are_separated_by_spaces_or_commas() -> None:
    assert resolve((BLOOD,), {"blood": "4, 5;6"}, "moles") == {"blood": (4, 5, 6)}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"agge": 3},
            "moles has no input 'agge': beside the image it takes age (number, 0 to 120), sex (f, m,",
        ),
        ({"agge": 3}, "Did you mean 'age'?"),
        ({"age": None}, 'moles needs age (number, 0 to 120) beside the image, as in "inputs": {"age": 60}.'),
        ({"age": 130}, "Input of moles: age must lie in the range 0 to 120; it is 130."),
        ({"age": -1e-9}, "age must lie in the range 0 to 120; it is -1e-09."),
        ({"age": "old"}, "age must be a number, not 'old'."),
        ({"age": [61]}, "age must be a number, not [61]."),
        ({"age": "nan"}, "age must be a number, not 'nan'."),
        ({"count": 2.5}, "count must be a whole number, not 2.5."),
        ({"count": 0}, "count must lie in the range from 1 on; it is 0."),
        ({"count": 2**24 + 1}, "count must lie in the range -16777216 to 16777216; it is 16777217."),
        (
            {"blood": [1, 2, 1e39]},
            "blood must lie in the range -3.40282346639e+38 to 3.40282346639e+38; it is",
        ),
        ({"sex": "female"}, "sex must be one of f, m, x, not 'female'"),
        ({"sex": "mm"}, "sex must be one of f, m, x, not 'mm'"),
        ({"site": 2}, "site must be one of 0, 1, not 2"),
        ({"blood": [1, 2]}, "blood must be a list of 3 numbers, not 2 of them."),
        ({"blood": 1}, "blood must be a list of 3 numbers, not 1."),
        ({"blood": [1, 2, "a"]}, "blood must be a number, not 'a'."),
        ({"camera": 4}, "moles has a constant camera, 4: a job cannot give it."),
    ],
)
def test_other_values_are_refused_with_what_would_be_right(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidNetworkInput, match=re.escape(why)):
        resolve(ALL, {**LEAST, **changes}, "moles")


def test_a_network_without_further_inputs_takes_none() -> None:
    assert resolve((), {}, "vgg16") == {}
    with pytest.raises(InvalidNetworkInput, match="vgg16 has no input 'age': it takes an image alone"):
        resolve((), {"age": 61}, "vgg16")


@pytest.mark.parametrize(
    "one",
    [
        *ALL,
        NetworkInput("count", "integer", minimum=0.5),
        NetworkInput("count", "integer", maximum=-0.5),
        NetworkInput("count", "integer", minimum=0.8, maximum=1.1),
    ],
)
def test_the_value_of_an_image_that_nobody_gives_one_for_is_allowed(one: NetworkInput) -> None:
    assert one.check(one.sample) == one.sample
    assert len(samples((one,))) == one.width
