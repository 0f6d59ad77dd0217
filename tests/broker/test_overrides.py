"""Which members of Celery's and kombu's ours replace or reach into: all stand in the page about them."""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradcam_worker.broker import consumer, transport

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "celery-overrides.md"
MODULES = (transport, consumer)
THEIRS = ("celery", "kombu")


def their_bases(ours: type[Any]) -> list[type[Any]]:
    return [one for one in ours.__mro__ if one.__module__.startswith(THEIRS)]


def our_classes(module: ModuleType) -> list[type[Any]]:
    found = [one for one in vars(module).values() if isinstance(one, type)]
    return [one for one in found if one.__module__ == module.__name__ and their_bases(one)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def attributes_in(source: str) -> set[str]:
    return {one.attr for one in ast.walk(ast.parse(source)) if isinstance(one, ast.Attribute)}


def replaced() -> set[str]:
    """`Class.member` of whatever a class of ours has that a base of Celery's or kombu's has, too."""
    found = set()
    for ours in (one for module in MODULES for one in our_classes(module)):
        bases = their_bases(ours)
        set_there = set[str]().union(*(attributes_in(inspect.getsource(one)) for one in bases))
        named = {*vars(ours), *inspect.get_annotations(ours)}
        for name in (one for one in named if not one.startswith("__")):
            if any(hasattr(base, name) for base in bases) or (is_private(name) and name in set_there):
                found.add(f"{ours.__name__}.{name}")
    return found


def reached_into() -> set[str]:
    """Each private member of theirs that our modules name."""
    bases = {base for module in MODULES for ours in our_classes(module) for base in their_bases(ours)}
    theirs = set[str]().union(*(attributes_in(inspect.getsource(one)) for one in bases))
    theirs |= {name for one in bases for name in vars(one)}
    named = set[str]().union(*(attributes_in(inspect.getsource(module)) for module in MODULES))
    return {name for name in named & theirs if is_private(name)}


def listed(title: str) -> set[str]:
    """The first column of the page's table below a title."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")
    section = rest.partition("\n## ")[0]
    return set(re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE))


def test_every_member_that_is_replaced_is_listed_and_no_other() -> None:
    assert replaced() == listed("Replaced members")


def test_every_private_member_that_is_used_is_listed_and_no_other() -> None:
    assert reached_into() == listed("Private members that are used")


def test_every_function_of_celerys_that_is_replaced_is_listed_and_no_other() -> None:
    sources = [one.read_text(encoding="utf-8") for one in (ROOT / "worker").rglob("*.py")]
    assigned = {
        name
        for text in sources
        for name in re.findall(r"^\s*((?:celery|kombu)\.[\w.]+) = ", text, re.MULTILINE)
    }
    assert assigned == listed("Replaced functions")


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    tests = "".join(one.read_text(encoding="utf-8") for one in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert [one for one in named if f"def {one}(" not in tests] == []


@pytest.mark.parametrize("title", ["Replaced members", "Private members that are used", "Replaced functions"])
def test_the_page_has_each_table(title: str) -> None:
    assert listed(title)
