"""Finds every log line of the package in its source, for docs/reference/log-events.md and a test."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from devtools import ROOT

PACKAGE = ROOT / "worker" / "gradcam_worker"
METHODS = {"debug", "info", "warning", "error", "exception", "critical"}


class LogCall(NamedTuple):
    """One call of the logger."""

    event: str | None  # None: it is no string literal
    level: str
    fields: tuple[str, ...]
    module: str
    line: int


@cache
def log_calls() -> tuple[LogCall, ...]:
    """Every call of a method of `log` in the package, in the order of its files."""
    return tuple(call for path in sorted(PACKAGE.rglob("*.py")) for call in _calls_of(path))


def _calls_of(path: Path) -> Iterator[LogCall]:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method)) if method in METHODS:
                fields = tuple(keyword.arg or "..." for keyword in node.keywords)
                level = "error" if method == "exception" else method
                event = getattr(node.args[0], "value", None) if len(node.args) == 1 else None
                name = event if isinstance(event, str) else None
                yield LogCall(name, level, fields, module, node.lineno)
