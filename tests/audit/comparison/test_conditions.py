"""Conditions of --fail-if: what they mean, and that they can do nothing else."""

import pytest

from gradcam_worker.audit.comparison.conditions import Condition
from gradcam_worker.errors import InvalidInput

FIGURES = {"moved": 4.0, "accuracy_change": -0.03, "distance_max": 0.25, "heat_inside_change": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("moved > 3", True),
        ("moved > 4", False),
        (" moved >= 4 ", True),
        ("moved == 4 and accuracy_change < -0.02", True),
        ("moved > 9 or accuracy_change < -0.02", True),
        ("not moved > 3", False),
        ("0.2 < distance_max < 0.3", True),
        ("0.2 < distance_max < 0.24", False),
        ("(moved + 1) / 2 - 0.5 != 2 * 1", False),
        ("-moved < +1", True),
        ("moved > 3 or heat_inside_change < 0", True),
        ("1e300 > moved", True),
    ],
)
def test_a_condition_is_what_it_says(text: str, expected: bool) -> None:
    assert Condition.parse(text, FIGURES).is_met(FIGURES) is expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no condition"),
        ("moved >", "is no condition"),
        ("moved", "'moved' is neither true nor false: compare it with something"),
        ("moved + 1", "neither true nor false"),
        ("move > 3", r"there is no figure 'move' \(near: moved\)"),
        ("zzzzzz > 3", r"there are: accuracy_change, distance_max, heat_inside_change, moved"),
        ("moved > '3'", "none of numbers, figures"),
        ("moved > True", "True is no number"),
        ("moved > 3j", "none of numbers"),
        ("moved > 1e400", "none of numbers"),
        (f"moved > 1{'0' * 400}", "none of numbers"),
        ("moved ** 9 > 3", "none of numbers, figures"),
        ("moved in 3", "neither true nor false"),
        ("__import__('os').system('id') > 0", "none of numbers, figures"),
        ("moved.real > 0", "none of numbers, figures"),
        ("(lambda: 1)() > 0", "none of numbers, figures"),
        ("[1 for one in moved] > 0", "none of numbers, figures"),
        ("(moved := 3) > 0", "none of numbers, figures"),
        ("moved > 3; moved", "is no condition"),
        ("moved > \0", "is no condition"),
        ("(" * 150 + "moved" + ")" * 150 + " > " + "-" * 150 + "1", "nested more than 20 deep"),
        ("(" * 240 + "moved" + ")" * 240 + " > 1", "is no condition"),
        ("moved > 1" + " " * 500, "it has 509 characters; at most 500 are read"),
    ],
)
def test_anything_else_is_refused_before_it_is_computed(text: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        Condition.parse(text, FIGURES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("heat_inside_change < 0", "cannot be decided: heat_inside_change is not known of these datasets"),
        ("1 / (moved - 4) > 0", "it divides by 0"),
    ],
)
def test_a_condition_that_cannot_be_decided_is_no_pass(text: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        Condition.parse(text, FIGURES).is_met(FIGURES)
