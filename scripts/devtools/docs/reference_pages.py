"""Writes the pages of docs/reference that the code itself can tell.

They are settings, command line, error codes, metrics and wire formats:

    scripts/docs                                      # writes them, then builds the site
    python -m devtools.docs.reference_pages --check   # names those that are not current

They are committed, so that they can be read without a build; `tests/docs/test_reference.py` fails where one
is not current. The meaning of a setting is the docstring of its field. That of another field is its
`description`, else its text in `field_meanings`, else the comment beside it.
"""

import ast
import inspect
import io
import itertools
import re
import sys
import tokenize
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AwareDatetime, BaseModel, SecretStr, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from devtools import ROOT
from devtools.docs import field_meanings
from devtools.docs.log_events import log_calls
from gradcam_worker import errors
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.cli.commands import gradcam
from gradcam_worker.observability.definitions import METRICS, PREFIX, MetricDefinition
from gradcam_worker.schemas.job import ID_PATTERN, Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument, StatusEvent
from gradcam_worker.settings import PREFIX as SETTING
from gradcam_worker.settings import Settings

FOLDER = ROOT / "docs" / "reference"
NOTE = "<!-- Written by scripts/docs from the code: do not edit. -->"
DEFAULT = "run"  # the command of a group that need not be named
SETTINGS_INTRO = f"""\
# Settings

{NOTE}

Every setting is an environment variable. Client, worker and command line read the same ones. A setting that
does not exist, or a wrong value, stops the program at start with a line for each that begins with its
name. Lists are written with commas, `GRADCAM_IMAGE_SCHEMES=s3,https`, or as JSON, `["s3", "https"]`. In the
path of a folder or a file, `~` is the user's home. Durations are in seconds. Whitespace around a value is
removed.

`gradcam doctor` checks whether they work.
"""
COMMAND_LINE_INTRO = f"""\
# Command line

{NOTE}

Exit codes: 0 success, 1 failure (the reason is on standard error), 2 wrong usage, 130 stopped by Ctrl-C.
Commands that take `--json` print JSON on standard output: one document, or one for each line.
"""
ERRORS_INTRO = f"""\
# Error codes

{NOTE}

Every failure is an exception of `gradcam_worker.errors` with a `code`, below the class of its cause:
`except ImageError` catches whatever is wrong with an image. A failed job carries the code, a sentence
(`detail`) and `retryable` in `error` of its status document. A code keeps its meaning; new ones may be added.

*Retryable*: the same request may succeed later. Each class also is one of these three:

* `PermanentError`: the job fails at once.
* `RetryableError`: the job is queued again, with backoff, until `max_attempts`.
* `LocalError`: it is raised to the caller, or ends a command. No status document holds one.
"""
BECOMES = {errors.PermanentError: "fails", errors.RetryableError: "retried", errors.LocalError: "raised"}
METRICS_INTRO = f"""\
# Metrics

{NOTE}

What `/metrics` of a worker or of `gradcam deliver` shows, for Prometheus. [Telemetry](../how-to/telemetry.md)
says how to turn it on.

Every label has few values, all known beforehand. What cannot be known at the moment, because the ledger
cannot be reached or there is no GPU, is absent, not zero. Metrics of the ledger are the same in every
process: take their maximum, not their sum.
"""
LOG_EVENTS_INTRO = f"""\
# Log events

{NOTE}

A log line of the package is the name of an event and its fields: `job_retry_scheduled delay_s=1.5
error="..."`. Search for the name. With `GRADCAM_LOG_FORMAT=json` each line is an object that has the name
as `event` and each field by its name; [Telemetry](../how-to/telemetry.md#logs) shows one. While a job runs,
`job_id`, `attempt` and `trace_id` are added to every line.

Names may change with a version; changes are in the changelog. Lines of libraries are sentences of their own.
"""
WIRE_INTRO = f"""\
# Wire formats

{NOTE}

All are JSON. The JSON schemas in `deploy/schemas` are written from the same models, by `scripts/schemas`. A
job with an unknown field is refused; a reader of the other documents should pass over fields that it does not
know.
[Upgrade](../how-to/upgrade.md) says what may change.
"""
MANY = 12  # values of a label that are written out
KIB = 1024
GROUPED = 10_000  # numbers from here on are written in groups of three digits
DAY_S = 86_400
SCALARS: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    SecretStr: "secret",
    Path: "path",
    datetime: "time, RFC 3339",
    AwareDatetime: "time, RFC 3339",
}


# Settings


def settings() -> str:
    """docs/reference/settings.md: every field of `Settings`, in its groups."""
    said, meanings = _comments(Settings), _docstrings(Settings)
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, field in Settings.model_fields.items():
        group, _ = said.get(name, ("", ""))
        meaning = " ".join(meanings.get(name, "").split())
        cells = (
            f"`{SETTING}{name.upper()}`",
            _type(field.annotation, field.metadata, boolean="yes or no"),
            _default(name, field.default),
            meaning,
        )
        groups.setdefault(group, []).append(cells)
    lines = [SETTINGS_INTRO.rstrip()]
    for group, rows in groups.items():
        lines += ["", f"## {group}", *_table("defaults", ("setting", "type", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field in a class's source; pydantic's own way would cost 25 ms at import."""
    (definition,) = ast.parse(inspect.getsource(model)).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    return {
        field.target.id: below.value.value
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _comments(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Of each field in a class's source: the comment line of its group, and its own comment."""
    found: dict[str, tuple[str, str]] = {}
    group = name = ""
    depth = 0
    fresh = True  # at the start of a line
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(model)).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").strip()
            if fresh:
                group, name = (text, "") if _is_title(text) else (group, name)
            elif name:
                found[name] = (found[name][0], text)
        elif token.type == tokenize.NAME and fresh and not depth:
            name = token.string if token.string in model.model_fields else ""
            found |= {name: (group, "")} if name else {}
        fresh = token.type in {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}
    return found


def _is_title(text: str) -> bool:
    return bool(text) and not text.endswith((".", ","))


def _bounds(facts: Iterable[Any]) -> str:
    signs = {Ge: "at least", Gt: "more than", Le: "at most", Lt: "less than"}
    for fact in facts:
        if isinstance(fact, StringConstraints) and fact.pattern:
            return "a UUID or a ULID" if fact.pattern == ID_PATTERN else f"`{fact.pattern}`"
        if isinstance(fact, StringConstraints) and fact.max_length:
            return f"at most {_number(fact.max_length)} characters"
    bounds = [
        f"{sign} {_number(getattr(fact, kind.__name__.lower()))}"
        for kind, sign in signs.items()
        for fact in facts
        if isinstance(fact, kind)
    ]
    return " and ".join(bounds)


def _number(value: float) -> str:
    return f"{value:,.15g}".replace(",", "\N{NO-BREAK SPACE}") if abs(value) >= GROUPED else f"{value:.15g}"


def _default(name: str, value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value in ("", None, ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    if isinstance(value, int | float):
        return f"{_number(value)}{_unit(name, value)}"
    return f"`{value}`"


def _unit(name: str, value: float) -> str:
    """The same number in larger units, where that says more."""
    if name.endswith("_s") and value >= DAY_S:
        return f" ({value / DAY_S:g} days)"
    for size, unit in ((KIB**3, "GiB"), (KIB**2, "MiB"), (KIB, "KiB")):
        if "bytes" in name and value >= size:
            return f" ({value / size:g} {unit})"
    return ""


# Command line


def command_line() -> str:
    """docs/reference/command-line.md: every command, from click."""
    lines = [COMMAND_LINE_INTRO.rstrip()]
    for words, command in _commands(("gradcam",), gradcam):
        lines += ["", *_command(words, command)]
    return "\n".join(lines) + "\n"


def _commands(
    words: tuple[str, ...], command: click.Command
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if command.hidden:
        return
    if not isinstance(command, click.Group):
        yield words, command
        return
    yield words, command.commands.get(DEFAULT, command)
    for name, one in sorted(command.commands.items()):
        if name != DEFAULT:
            yield from _commands((*words, name), one)


def _command(words: tuple[str, ...], command: click.Command) -> Iterator[str]:
    yield f"{'##' if len(words) == 1 else '###'} {' '.join(words)}"
    context = click.Context(command, info_name=" ".join(words))
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            title, *examples = paragraph.strip("\b\n").splitlines()
            yield from ("", title, "", "```text", *(line.strip() for line in examples), "```")
        else:
            yield from ("", paragraph)
    usage = " ".join(command.collect_usage_pieces(context)).replace("COMMAND [ARGS]...", "COMMAND")
    yield from ("", f"Usage: `{' '.join(words)} {usage}`")
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    options = [one for one in options if "--help" not in one.opts and "--version" not in one.opts]
    rows = [_option(*record) for one in options if (record := one.get_help_record(context))]
    if rows:
        yield from _table("options", ("option", "meaning"), rows)


def _option(named: str, said: str) -> tuple[str, str]:
    """An option as click shows it: its choices go to what it means, since a table's cells end at a bar."""
    meaning = re.sub(r"\s+", " ", said).replace("[", r"\[")
    found = re.fullmatch(r"(.*) \[(.+\|.+)\]", named)
    if found:
        named, choices = found.groups()
        listed = ", ".join(f"`{choice}`" for choice in choices.split("|"))
        meaning = f"{listed} {meaning}" if meaning.startswith("\\[") else f"{listed}: {meaning}"
    return f"`{named.replace('|', ' or ')}`", meaning


# Errors


def error_codes() -> str:
    """docs/reference/errors.md: the tree of `gradcam_worker.errors`."""
    lines = [ERRORS_INTRO.rstrip()]
    for cause, kinds in _by_cause().items():
        if cause is errors.GradcamError:
            lines += ["", "## Others"]
        else:
            lines += ["", f"## {cause.__name__}", "", _first_line(cause)]
        rows = [
            (
                f"`{one.code}`",
                f"`{one.__name__}`",
                "yes" if one.retryable else "no",
                f"`{_becomes(one).__name__}`",
                _first_line(one),
            )
            for one in kinds
        ]
        lines += _table("errors", ("code", "exception", "retryable", "also a", "meaning"), rows)
    lines += ["", "## The tree", "", "```text", *error_tree(), "```"]
    return "\n".join(lines) + "\n"


def error_tree() -> Iterator[str]:
    """Every error below its cause, with its code and what becomes of a job."""
    yield errors.GradcamError.__name__
    groups = _by_cause()
    others = groups.pop(errors.GradcamError)
    for cause, kinds in groups.items():
        yield f"├── {cause.__name__}"
        for one in kinds:
            yield _branch("│   └── " if one is kinds[-1] else "│   ├── ", one)
    for one in others:
        yield _branch("└── " if one is others[-1] else "├── ", one)


def _branch(branch: str, one: type[errors.GradcamError]) -> str:
    return f"{branch + one.__name__:<35}{one.code:<26}{BECOMES[_becomes(one)]}"


def _becomes(one: type[errors.GradcamError]) -> type[errors.GradcamError]:
    """Which of the three says what becomes of a job."""
    (found,) = (kind for kind in BECOMES if issubclass(one, kind))
    return found


def _by_cause() -> dict[type[errors.GradcamError], list[type[errors.GradcamError]]]:
    """Each cause and its errors, as they are defined; those without one come last, below the root."""
    groups: dict[type[errors.GradcamError], list[type[errors.GradcamError]]] = {}
    for one in errors.all_errors():
        cause = one.__bases__[0]
        groups.setdefault(errors.GradcamError if cause in BECOMES else cause, []).append(one)
    return groups


def _first_line(one: type) -> str:
    return re.sub(r"\s+", " ", (one.__doc__ or "").partition("\n\n")[0]).strip()


# Metrics


def metrics() -> str:
    """docs/reference/metrics.md: every metric of `observability.definitions`."""
    lines = [METRICS_INTRO.rstrip()]
    scopes = {"process": "Of this process", "device": "Of the GPU", "ledger": "Of the ledger"}
    for scope, heading in scopes.items():
        rows = [_metric(one) for one in METRICS if one.source == scope]
        lines += ["", f"## {heading}", *_table("metrics", ("metric", "kind", "labels", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _metric(one: MetricDefinition) -> tuple[str, ...]:
    labels = [
        f"`{name}`" + (f": {', '.join(filter(None, values))}" if 1 < len(values) <= MANY else "")
        for name, values in one.labels.items()
    ]
    return f"`{PREFIX}{one.name}`", one.kind, "; ".join(labels), one.help


# Log events


def log_events() -> str:
    """docs/reference/log-events.md: every event that the package logs."""
    rows: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for call in log_calls():
        fields, modules = rows.setdefault((call.event or "", call.level), ({}, {}))
        fields.update(dict.fromkeys(call.fields))
        modules[call.module] = None
    table = _table(
        "events",
        ("event", "level", "fields", "module"),
        (
            (f"`{event}`", level, ", ".join(f"`{name}`" for name in fields), ", ".join(modules))
            for (event, level), (fields, modules) in sorted(rows.items())
        ),
    )
    return "\n".join([LOG_EVENTS_INTRO.rstrip(), *table]) + "\n"


# Wire formats


# Title -> model, its schema in deploy/schemas, and what it is.
DOCUMENTS: Mapping[str, tuple[type[BaseModel], str, str]] = {
    "Job": (Job, "job.v1.json", "What a client puts on the queue."),
    "Status document": (StatusDocument, "status.v1.json", "What is known about a job."),
    "Event": (StatusEvent, "event.v1.json", "What a webhook receives."),
    "Manifest": (Manifest, "manifest.v1.json", "What a job has left in storage."),
    "Shard": (Shard, "shard.v1.json", "Written by `gradcam backfill`, read by workers."),
    "Backfill": (Plan, "backfill.v1.json", "`backfill.json` in a dataset."),
}


def wire_formats() -> str:
    """docs/reference/wire-formats.md: the fields of every document that crosses a process."""
    lines = [WIRE_INTRO.rstrip()]
    shown: set[type[BaseModel]] = set()
    for title, (model, schema, about) in DOCUMENTS.items():
        lines += ["", f"## {title}", "", f"`deploy/schemas/{schema}`. {about}"]
        waiting = [model]
        while waiting:
            one = waiting.pop(0)
            if one in shown:
                continue
            shown.add(one)
            lines += _model(one, top=one is model)
            waiting += [inner for inner in _models(one) if inner not in waiting]
    return "\n".join(lines) + "\n"


def _model(model: type[BaseModel], *, top: bool) -> Iterator[str]:
    if not top:
        yield from ("", f"### {model.__name__}", "", _first_line(model))
    said = _comments_of_all(model)
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _json_default(field)
        own = field_meanings.JOB.get(field.alias or name) if model is Job else None
        meaning = field.description or own or said.get(name, ("", ""))[1]
        kind = _type(field.annotation, field.metadata)
        rows.append((f"`{field.alias or name}`", kind, default, meaning))
    yield from _table("defaults", ("field", "type", "default", "meaning"), rows)


def _comments_of_all(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for one in reversed(model.__mro__):
        if isinstance(one, type) and issubclass(one, BaseModel) and one is not BaseModel:
            found |= _comments(one)
    return found


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that a model's fields are made of."""
    found: list[type[BaseModel]] = []

    def look(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        for inner in get_args(annotation):
            look(inner)

    for field in model.model_fields.values():
        look(field.annotation)
    return found


def _type(annotation: Any, metadata: Iterable[Any] = (), boolean: str = "true or false") -> str:
    """Return the type and range of a field in words; models are links to their tables."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata], boolean)
    facts = [one for item in metadata for one in (item.metadata if isinstance(item, FieldInfo) else (item,))]
    if origin in {Union, types.UnionType}:
        kinds = (_type(one, facts, boolean) for one in arguments if one is not type(None))
        text = " or ".join(dict.fromkeys(kinds))
    elif origin is Literal:
        text = ", ".join(f"`{choice}`" for choice in arguments)
    elif origin is dict:
        text = f"object: {_type(arguments[1])}"
    elif origin is tuple:
        text = _list(arguments, facts)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        titles = (title for title, (model, *_) in DOCUMENTS.items() if model is annotation)
        title = next(titles, annotation.__name__)
        text = f"[{title}](#{title.lower().replace(' ', '-')})"
    else:
        kind = boolean if annotation is bool else SCALARS.get(annotation, getattr(annotation, "__name__", ""))
        text = ", ".join(filter(None, (kind, _bounds(facts))))
    return text


def _list(arguments: tuple[Any, ...], facts: list[Any]) -> str:
    inner = [one for one in arguments if one is not Ellipsis]
    sizes = [f"at least {one.min_length}" for one in facts if isinstance(one, MinLen) and one.min_length]
    sizes += [f"at most {one.max_length}" for one in facts if isinstance(one, MaxLen)]
    counted = f" ({', '.join(sizes)})" if sizes else f" of {len(inner)}" if len(inner) > 1 else ""
    return f"list{counted}: {_type(inner[0])}"


def _json_default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "empty" if field.default_factory in {dict, list, tuple} else "generated"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple) and value:
        return ", ".join(f"`{getattr(one, 'kind', one)}`" for one in value)
    return {"None": "none", "True": "true", "False": "false", "()": "empty"}.get(str(value), f"`{value}`")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"


def _table(kind: str, headings: Sequence[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table; `kind` names how it is laid out where the screen is narrow: see docs/stylesheets."""
    yield from ("", f'<div class="cards {kind}" markdown>', "")
    yield from (_row(headings), "|" + "---|" * len(headings))
    yield from map(_row, rows)
    yield from ("", "</div>")


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings,
    "command-line.md": command_line,
    "errors.md": error_codes,
    "metrics.md": metrics,
    "log-events.md": log_events,
    "wire-formats.md": wire_formats,
}


def write(files: Mapping[Path, str], *, check: bool, program: str) -> int:
    """Write generated files, or only name those that are not current; return the exit code."""
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
    names = [path.relative_to(ROOT) for path in stale]
    if check:
        for name in names:
            print(f"{name} is not what the code says: run {program}.", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    print(
        f"{len(files)} files, {len(stale)} of them changed{': ' * bool(names)}{', '.join(map(str, names))}."
    )
    return 0


def main(arguments: list[str]) -> int:
    """Write the pages; with --check, only name those that are not current."""
    files = {FOLDER / name: page() for name, page in PAGES.items()}
    return write(files, check="--check" in arguments, program="scripts/docs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
