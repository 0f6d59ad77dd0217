"""Conditions over named figures, as in `moved > 3 or accuracy_change < -0.02`.

They are read with Python's own parser and computed here: of the language only numbers, names, `+ - * /`,
comparisons, `and`, `or`, `not` and brackets are left, so that nothing can be called or looked into.
"""

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gradcam_worker.errors import InvalidInput
from gradcam_worker.text.similar_names import nearest

MAX_CHARACTERS = 500
MAX_NUMBER = 1e300  # a whole number may be too great to compute with
MAX_DEPTH = 20  # of brackets and operators within each other
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
EXAMPLE = "write for example: moved > 3 or accuracy_change < -0.02"


@dataclass(frozen=True)
class Condition:
    """A condition that was checked.

    Attributes:
        text: As it was written.
    """

    text: str
    _tree: ast.expr

    @classmethod
    def parse(cls, text: str, figures: Collection[str]) -> "Condition":
        """Read a condition.

        Args:
            text: The condition.
            figures: The names that it may use.

        Returns:
            The condition.

        Raises:
            InvalidInput: It is none; the message says where.
        """
        try:
            if len(text) > MAX_CHARACTERS:
                message = f"it has {len(text):,} characters; at most {MAX_CHARACTERS} are read"
                raise ValueError(message)  # noqa: TRY301  # told like all others
            tree = ast.parse(text.strip(), mode="eval").body
            _check_condition(tree, figures, MAX_DEPTH)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or "it is nested too deeply"
            message = f"{text[:200]!r} is no condition: {reason}; {EXAMPLE}"
            raise InvalidInput(message) from error
        return cls(text.strip(), tree)

    def is_met(self, figures: Mapping[str, float | None]) -> bool:
        """Compute the condition.

        Args:
            figures: The value of each name; None: it is not known.

        Returns:
            Whether it is true.

        Raises:
            InvalidInput: A figure that it needs is not known, or it divides by 0.
        """
        try:
            return _is_true(self._tree, figures)
        except _UnknownFigure as error:
            message = f"{self.text!r} cannot be decided: {error} is not known of these datasets."
            raise InvalidInput(message) from error
        except ZeroDivisionError as error:
            message = f"{self.text!r} cannot be decided: it divides by 0."
            raise InvalidInput(message) from error


class _UnknownFigure(Exception):
    pass


def _check_condition(node: ast.expr, figures: Collection[str], depth: int) -> None:
    """Check an expression that is true or false. Raises ValueError."""
    _check_depth(depth)
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                _check_condition(part, figures, depth - 1)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            _check_condition(part, figures, depth - 1)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in COMPARISONS for op in ops):
            for part in (left, *rest):
                _check_number(part, figures, depth - 1)
        case _:
            message = f"{ast.unparse(node)[:60]!r} is neither true nor false: compare it with something"
            raise ValueError(message)


def _check_number(node: ast.expr, figures: Collection[str], depth: int) -> None:
    """Check an expression that is a number. Raises ValueError."""
    _check_depth(depth)
    match node:
        case ast.Constant(value=bool()):
            message = f"{node.value!r} is no number"
            raise ValueError(message)
        case ast.Constant(value=int() | float() as number) if abs(number) <= MAX_NUMBER:
            pass
        case ast.Name(id=name) if name in figures:
            pass
        case ast.Name(id=name):
            similar = nearest(name, figures)
            hint = f"near: {', '.join(similar)}" if similar else f"there are: {', '.join(sorted(figures))}"
            message = f"there is no figure {name!r} ({hint})"
            raise ValueError(message)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=part):
            _check_number(part, figures, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            for part in (left, right):
                _check_number(part, figures, depth - 1)
        case _:
            message = f"{ast.unparse(node)[:60]!r} is none of numbers, figures and + - * /"
            raise ValueError(message)


def _check_depth(depth: int) -> None:
    if depth < 0:
        message = f"it is nested more than {MAX_DEPTH} deep"
        raise ValueError(message)


def _is_true(node: ast.expr, figures: Mapping[str, float | None]) -> bool:
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_is_true(part, figures) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_is_true(part, figures) for part in parts)
        case ast.UnaryOp(operand=part):
            return not _is_true(part, figures)
        case ast.Compare(left=left, ops=ops, comparators=rest):
            values = [_number(part, figures) for part in (left, *rest)]
            pairs = zip(ops, values, values[1:], strict=False)  # of n values there are n - 1 pairs
            return all(COMPARISONS[type(op)](a, b) for op, a, b in pairs)
    raise AssertionError(node)


def _number(node: ast.expr, figures: Mapping[str, float | None]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            figure = figures.get(name)
            if figure is None:
                raise _UnknownFigure(name)
            return figure
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -_number(part, figures)
        case ast.UnaryOp(operand=part):
            return _number(part, figures)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_number(left, figures), _number(right, figures))
    raise AssertionError(node)
