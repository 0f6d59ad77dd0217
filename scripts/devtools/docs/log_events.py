"""Finds every log line of the package in its source, for docs/reference/log-events.md and a test."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from devtools import ROOT

PACKAGE = ROOT / "worker" / "gradcam_worker"
LEVELS = {
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "error": "error",
    "exception": "error",
    "critical": "critical",
}


@dataclass(frozen=True)
class LogCall:
    """One call of the logger."""

    event: str | None  # None: it is no string literal
    level: str
    fields: tuple[str, ...]
    module: str
    line: int


def log_calls(package: Path = PACKAGE) -> Iterator[LogCall]:
    """Every call of a method of `log` in the package, in the order of its files."""
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method)) if method in LEVELS:
                    fields = tuple(keyword.arg or "..." for keyword in node.keywords)
                    yield LogCall(_literal(node), LEVELS[method], fields, module, node.lineno)


def _literal(call: ast.Call) -> str | None:
    match call.args:
        case [ast.Constant(value=str(event))]:
            return event
        case _:
            return None
