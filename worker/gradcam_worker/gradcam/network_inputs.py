"""Further inputs of a network, beside the image: a patient's age, the sex, where a photo was taken.

The registry describes each by a `NetworkInput`; a job gives their values by name. They are checked here, and
become one row of numbers for each image, in the order of the registry. An input of the model gets the numbers
of all `NetworkInput`s that name it, one after the other.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradcam_worker.errors import InvalidNetworkInput
from gradcam_worker.text.similar_names import nearest

InputKind = Literal["number", "integer", "category"]
Encoding = Literal["one_hot", "index"]
InputValue = float | str | tuple[float, ...]  # as it is given; a category as its text

MAX_INTEGER = 2**24  # that a float32 holds exactly
MAX_NUMBER = (2 - 2**-23) * 2.0**127  # the largest float32
MAX_LISTED = 12  # categories in a message
KINDS = {"number": "a number", "integer": "a whole number", "category": "one of its values"}


@dataclass(frozen=True)
class NetworkInput:
    """One further input of a network.

    Attributes:
        name: By which jobs give its value.
        kind: `number`, `integer`, or `category`: one of `values`.
        input: The input of the model that gets it; None: the one of the same name.
        shape: Of numbers, where it is more than one.
        default: Its value where a job gives none; None: a job must give one.
        constant: Whether it is always `default`.
        minimum: The smallest number allowed; None: any.
        maximum: The largest number allowed; None: any.
        values: Of a category, in the order of its encoding.
        encoding: Of a category: `one_hot`, a number for each value, or `index`, its position in `values`.
        scale: The model gets `number * scale + offset`.
        offset: See `scale`.
    """

    name: str
    kind: InputKind = "number"
    input: str | None = None
    shape: tuple[int, ...] = ()
    default: InputValue | None = None
    constant: bool = False
    minimum: float | None = None
    maximum: float | None = None
    values: tuple[str, ...] = ()
    encoding: Encoding = "one_hot"
    scale: float = 1.0
    offset: float = 0.0

    @property
    def model_input(self) -> str:
        """The name of the input of the model that gets it."""
        return self.input or self.name

    @property
    def width(self) -> int:
        """The number of numbers that it becomes."""
        if self.kind == "category":
            return len(self.values) if self.encoding == "one_hot" else 1
        return math.prod(self.shape)

    @property
    def sample(self) -> InputValue:
        """An allowed value, for images without a value of their own."""
        if self.default is not None:
            return self.default
        if self.kind == "category":
            return self.values[0]
        low, high = self.minimum, self.maximum
        if self.kind == "integer":
            low, high = low and float(math.ceil(low)), high and float(math.floor(high))
        if low is not None and high is not None:
            middle = (low + high) / 2
            number = float(math.floor(middle)) if self.kind == "integer" else middle
        else:
            number = next((limit for limit in (low, high) if limit is not None), 0.0)
        return (number,) * self.width if self.shape else number

    def describe(self) -> str:
        """Describe what it takes, as in `age (number, 0 to 120)`."""
        if self.constant:
            return f"{self.name} (always {_shown(self.default)})"
        if self.kind == "category":
            facts = [_listed(self.values)]
        else:
            facts = [f"{self.width} {self.kind}s" if self.shape else self.kind, *_range(self)]
        if self.default is not None:
            facts.append(f"default {_shown(self.default)}")
        return f"{self.name} ({', '.join(facts)})"

    def check(self, value: Any) -> InputValue:
        """Check a value, and convert it.

        Args:
            value: As a job gives it; a number may be a text, as in a table.

        Returns:
            A category as its text; else a number, or as many as the shape has.

        Raises:
            InvalidNetworkInput: It is of another type, or not allowed.
        """
        if self.kind == "category":
            text = value if isinstance(value, str) else _number_as_text(value)
            if text not in self.values:
                hint = nearest(text, self.values) if text else []
                similar = f": did you mean {' or '.join(map(repr, hint))}?" if hint else ""
                message = f"{self.name} must be one of {_listed(self.values)}, not {_shown(value)}{similar}"
                raise InvalidNetworkInput(message)
            return text
        if not self.shape:
            return self._number(value)
        given = re.split(r"[\s,;]+", value.strip()) if isinstance(value, str) else value
        if not isinstance(given, list | tuple) or len(given) != self.width:
            count = f"{len(given)} of them" if isinstance(given, list | tuple) else _shown(value)
            message = f"{self.name} must be a list of {self.width} numbers, not {count}"
            raise InvalidNetworkInput(message)
        return tuple(map(self._number, given))

    def _number(self, value: Any) -> float:
        number = _as_number(value)
        limit = MAX_INTEGER if self.kind == "integer" else MAX_NUMBER
        if number is None or (self.kind == "integer" and not number.is_integer()):
            message = f"{self.name} must be {KINDS[self.kind]}, not {_shown(value)}"
            raise InvalidNetworkInput(message)
        low = -limit if self.minimum is None else self.minimum
        high = limit if self.maximum is None else self.maximum
        if not max(low, -limit) <= number <= min(high, limit):
            is_stated = abs(number) <= limit
            bounds = ", ".join(_range(self)) if is_stated else f"-{limit:.12g} to {limit:.12g}"
            message = f"{self.name} must lie in the range {bounds}; it is {_shown(value)}"
            raise InvalidNetworkInput(message)
        return number

    def encode(self, value: InputValue) -> tuple[float, ...]:
        """Return the numbers that the model gets for a checked value."""
        if self.kind == "category":
            index = self.values.index(str(value))
            if self.encoding == "index":
                return (float(index),)
            return tuple(float(position == index) for position in range(len(self.values)))
        numbers = value if isinstance(value, tuple) else (value,)
        return tuple(float(number) * self.scale + self.offset for number in numbers)


def resolve(inputs: Sequence[NetworkInput], given: Mapping[str, Any], network: str) -> dict[str, InputValue]:
    """Check what a job gives, and fill in defaults and constants.

    Args:
        inputs: Of the network.
        given: Values by name.
        network: The network's name, for messages.

    Returns:
        The value of each input, in the order of `inputs`.

    Raises:
        InvalidNetworkInput: An input is unknown, missing, constant, of the wrong type, or not allowed.
    """
    takes = ", ".join(one.describe() for one in inputs)
    by_name = {one.name: one for one in inputs}
    for name in given:
        if name not in by_name:
            hint = nearest(name, by_name) if by_name else []
            similar = f" Did you mean {' or '.join(map(repr, hint))}?" if hint else ""
            has = f"beside the image it takes {takes}" if inputs else "it takes an image alone"
            message = f"{network} has no input {name[:60]!r}: {has}.{similar}"
            raise InvalidNetworkInput(message)
        if by_name[name].constant:
            message = (
                f"{network} has a constant {name}, {_shown(by_name[name].default)}: a job cannot give it."
            )
            raise InvalidNetworkInput(message)
    values: dict[str, InputValue] = {}
    for one in inputs:
        value = given.get(one.name)
        if value is None:
            value = one.default
        if value is None:
            message = (
                f"{network} needs {one.describe()} beside the image, as in "
                f'"inputs": {{"{one.name}": {_as_json(one.sample)}}}.'
            )
            raise InvalidNetworkInput(message)
        try:
            values[one.name] = one.check(value)
        except InvalidNetworkInput as error:
            message = f"Input of {network}: {error}" + ("" if str(error).endswith("?") else ".")
            raise InvalidNetworkInput(message) from error
    return values


def encode(inputs: Sequence[NetworkInput], values: Mapping[str, InputValue]) -> tuple[float, ...]:
    """Return the numbers for one image, of values from `resolve`."""
    return tuple(number for one in inputs for number in one.encode(values[one.name]))


def samples(inputs: Sequence[NetworkInput]) -> tuple[float, ...]:
    """Return the numbers of allowed values, for images without values of their own."""
    return tuple(number for one in inputs for number in one.encode(one.sample))


def as_given(value: InputValue) -> float | str | tuple[float, ...]:
    """Return a value as documents show it: whole numbers without a point."""
    if isinstance(value, str):
        return value
    return tuple(map(_whole, value)) if isinstance(value, tuple) else _whole(value)


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() and abs(number) <= MAX_INTEGER else number


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _number_as_text(value: Any) -> str:
    """A number as a category's text: 1 and 1.0 are the category 1."""
    number = None if isinstance(value, str) else _as_number(value)
    return "" if number is None else str(_whole(number))


def _range(one: NetworkInput) -> list[str]:
    low, high = one.minimum, one.maximum
    if low is not None and high is not None:
        return [f"{low:g} to {high:g}"]
    if low is not None:
        return [f"from {low:g} on"]
    return [f"up to {high:g}"] if high is not None else []


def _listed(values: Sequence[str]) -> str:
    more = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return ", ".join(values[:MAX_LISTED]) + more


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{_whole(value):.12g}"
    return repr(value)[:80]


def _as_json(value: InputValue) -> str:
    return json.dumps(as_given(value))
