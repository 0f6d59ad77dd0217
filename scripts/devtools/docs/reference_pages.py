"""Writes what the code itself can tell into the pages of docs/reference, and JSON schemas into deploy/.

The pages are settings, command line, HTTP API, error codes, metrics, log events and wire formats; the schemas
are those of the wire formats, and of the settings that the chart's values may hold:

    scripts/docs                                      # writes them, then builds the site
    python -m devtools.docs.reference_pages --check   # names those that are not current

What stands above the note in a page is written by hand and kept. All is committed, so that it can be read
without a build; `tests/docs/test_reference.py` fails where a file is not current. The meaning of a field is
the string below it in its class, else the comment beside it.
"""

import ast
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import click
from pydantic import BaseModel

from devtools import ROOT
from devtools.deploy_checks import helm
from devtools.docs.log_events import log_calls
from gradcam_worker import errors
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.cli.commands import gradcam
from gradcam_worker.cli.exit_codes import MEANINGS, ExitCode
from gradcam_worker.gateway.app import create_app
from gradcam_worker.observability.definitions import METRICS, PREFIX
from gradcam_worker.schemas.job import ID_PATTERN, Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument, StatusEvent
from gradcam_worker.settings import PREFIX as SETTING
from gradcam_worker.settings import Settings

FOLDER = ROOT / "docs" / "reference"
SCHEMAS = ROOT / "deploy" / "schemas"
NOTE = "<!-- Below here scripts/docs writes, from the code: do not edit. -->"
DEFAULT = "run"  # the command of a group that need not be named
OUTCOMES = (errors.PermanentError, errors.RetryableError, errors.LocalError)
MANY = 12  # values of a label that are written out
GROUPED = 10_000  # numbers from here on are written in groups of three digits
UNITS = (("_s$", 86_400, "days"), ("bytes", 2**30, "GiB"), ("bytes", 2**20, "MiB"), ("bytes", 2**10, "KiB"))
SCALARS = {  # of a JSON schema: its format, else its type
    "date-time": "time, RFC 3339",
    "password": "secret",
    "path": "path",
    "string": "text",
    "boolean": "true or false",
}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
# Title -> model, its schema in deploy/schemas, and what it is.
DOCUMENTS: Mapping[str, tuple[type[BaseModel], str, str]] = {
    "Job": (Job, "job.v1.json", "What a client puts on the queue."),
    "Status document": (StatusDocument, "status.v1.json", "What is known about a job."),
    "Event": (StatusEvent, "event.v1.json", "What a webhook receives."),
    "Manifest": (Manifest, "manifest.v1.json", "What a job has left in storage."),
    "Shard": (Shard, "shard.v1.json", "Written by `gradcam backfill`, read by workers."),
    "Backfill": (Plan, "backfill.v1.json", "`backfill.json` in a dataset."),
}
TITLES = {model.__name__: title for title, (model, *_) in DOCUMENTS.items()}


def settings() -> Iterator[str]:
    """docs/reference/settings.md: every field of `Settings`, below the comment that heads its group."""
    rows_of = {name: (f"`{SETTING}{name.upper()}`", *cells) for name, *cells in fields(Settings)}
    groups: dict[str, list[tuple[str, ...]]] = {}
    heading = ""
    source = inspect.getsource(Settings)
    for title, name in re.findall(r"^    (?:# (.*[^.,])$|(\w+): )", source, re.MULTILINE):
        heading = title or heading
        if name in rows_of:
            groups.setdefault(heading, []).append(rows_of[name])
    for heading, rows in groups.items():
        yield from ("", f"## {heading}")
        yield from _table("defaults", ("setting", "type", "default", "meaning"), rows)


def command_line() -> Iterator[str]:
    """docs/reference/command-line.md: the exit codes, and every command, from click."""
    yield from ("", "## Exit codes")
    yield from _table("codes", ("code", "meaning"), ((f"`{code:d}`", MEANINGS[code]) for code in ExitCode))
    for words, command in _commands(("gradcam",), gradcam):
        yield from ("", f"{'##' if len(words) == 1 else '###'} {' '.join(words)}")
        # A command keeps its first context's names for --help, and a test may run it afterwards.
        context = click.Context(command, info_name=" ".join(words), **gradcam.context_settings)
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            if paragraph.startswith("\b"):
                title, *examples = paragraph.strip("\b\n").splitlines()
                yield from ("", title, "", "```text", *(line.strip() for line in examples), "```")
            else:
                yield from ("", paragraph)
        usage = " ".join(command.collect_usage_pieces(context)).replace("COMMAND [ARGS]...", "COMMAND")
        yield from ("", f"Usage: `{' '.join(words)} {usage}`")
        options = [option for option in command.params if isinstance(option, click.Option)]
        shown = [option for option in options if not {"--help", "--version"} & {*option.opts}]
        # click gives no record of a hidden one
        rows = [_option(*record) for option in shown if (record := option.get_help_record(context))]
        if rows:
            yield from _table("options", ("option", "meaning"), rows)


def _commands(
    words: tuple[str, ...], command: click.Command
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    commands = command.commands if isinstance(command, click.Group) else {}
    yield words, commands.get(DEFAULT, command)
    for name, subcommand in sorted(commands.items()):
        if name != DEFAULT and not subcommand.hidden:
            yield from _commands((*words, name), subcommand)


def _option(names: str, help_text: str) -> tuple[str, str]:
    """An option as click shows it: its choices go to what it means, since a table's cells end at a bar."""
    meaning = re.sub(r"\s+", " ", help_text).replace("[", r"\[")
    with_choices = re.fullmatch(r"(.*) \[(.+\|.+)\]", names)
    if with_choices:
        names, choices = with_choices.groups()
        listed = ", ".join(f"`{choice}`" for choice in choices.split("|"))
        meaning = f"{listed} {meaning}" if meaning.startswith("\\[") else f"{listed}: {meaning}"
    return f"`{names.replace('|', ' or ')}`", meaning


def error_codes() -> Iterator[str]:
    """docs/reference/errors.md: the tree of `gradcam_worker.errors`."""
    for cause, kinds in by_cause().items():
        about = (
            ["## Others"] if cause is errors.GradcamError else [f"## {cause.__name__}", "", _summary(cause)]
        )
        yield from ("", *about)
        rows = [
            (
                f"`{kind.code}`",
                f"`{kind.__name__}`",
                "yes" if kind.retryable else "no",
                f"`{outcome(kind).__name__}`",
                _summary(kind),
            )
            for kind in kinds
        ]
        yield from _table("errors", ("code", "exception", "retryable", "also a", "meaning"), rows)
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1]
    yield from ("", "## The tree", "", "```text", textwrap.dedent(tree), "```")


def outcome(kind: type[errors.GradcamError]) -> type[errors.GradcamError]:
    """Which of the three says what becomes of a job."""
    return next(base for base in OUTCOMES if issubclass(kind, base))


def by_cause() -> dict[type[errors.GradcamError], list[type[errors.GradcamError]]]:
    """Each cause and its errors, as they are defined; those without one come last, below the root."""
    groups: dict[type[errors.GradcamError], list[type[errors.GradcamError]]] = {}
    for kind in errors.all_errors():
        cause = kind.__bases__[0]
        groups.setdefault(errors.GradcamError if cause in OUTCOMES else cause, []).append(kind)
    return groups


def metrics() -> Iterator[str]:
    """docs/reference/metrics.md: every metric of `observability.definitions`."""
    headings = {
        "process": "Of this process",
        "gateway": "Of `gradcam serve`",
        "jobs": "Of a job process, beside an engine process",
        "supervisor": "Of the supervisor of engine and job processes",
        "device": "Of the GPU",
        "ledger": "Of the ledger",
    }
    for source, heading in headings.items():
        rows = [
            (f"`{PREFIX}{metric.name}`", metric.kind, _labels(metric.labels), metric.help)
            for metric in METRICS
            if source == (metric.roles[0] if metric.roles in {("jobs",), ("gateway",)} else metric.source)
        ]
        yield from ("", f"## {heading}")
        yield from _table("metrics", ("metric", "kind", "labels", "meaning"), rows)


def _labels(labels: Mapping[str, tuple[str, ...]]) -> str:
    return "; ".join(
        f"`{name}`" + (f": {', '.join(filter(None, values))}" if 1 < len(values) <= MANY else "")
        for name, values in labels.items()
    )


def log_events() -> Iterator[str]:
    """docs/reference/log-events.md: every event that the package logs."""
    events: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for call in log_calls():
        names, modules = events.setdefault((call.event or "", call.level), ({}, {}))
        names.update(dict.fromkeys(f"`{field}`" for field in call.fields))
        modules[call.module] = None
    rows = (
        (f"`{event}`", level, ", ".join(names), ", ".join(modules))
        for (event, level), (names, modules) in sorted(events.items())
    )
    yield from _table("events", ("event", "level", "fields", "module"), rows)


def wire_formats() -> Iterator[str]:
    """docs/reference/wire-formats.md: the fields of every document that crosses a process."""
    shown: set[type[BaseModel]] = set()
    for title, (document, file, about) in DOCUMENTS.items():
        yield from ("", f"## {title}", "", f"`deploy/schemas/{file}`. {about}")
        waiting = [document]
        while waiting:
            model = waiting.pop(0)
            if model in shown:
                continue
            shown.add(model)
            if model is not document:
                yield from ("", f"### {model.__name__}", "", _summary(model))
            rows = ((f"`{name}`", *cells) for name, *cells in fields(model))
            yield from _table("defaults", ("field", "type", "default", "meaning"), rows)
            annotations = [field.annotation for field in model.model_fields.values()]
            waiting += [inner for annotation in annotations for inner in _models(annotation)]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """The rows of a model's table: field, type, default, meaning."""
    schema, meanings = model.model_json_schema(), _meanings(model)
    for name, field in model.model_fields.items():
        key = field.alias or name
        part = schema["properties"][key]
        default = "required" if field.is_required() else _default(name, part)
        yield key, _type(part), default, meanings.get(name, "")


def _default(name: str, schema: Mapping[str, Any]) -> str:
    if "default" not in schema:  # a factory makes it
        return "empty" if schema["type"] in {"array", "object"} else "generated"
    value = schema["default"]
    if isinstance(value, list) and value:
        return ", ".join(f"`{item['kind'] if isinstance(item, dict) else item}`" for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{_number(value)}{_in_larger_units(name, value)}"
    words = {"None": "none", "": "none", "[]": "empty", "True": "true", "False": "false"}
    return "its defaults" if isinstance(value, dict) else words.get(str(value), f"`{value}`")


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """What each field means, from the source; pydantic's own way would cost 25 ms at import."""
    meanings: dict[str, str] = {}
    for definition in reversed(model.__mro__):
        if not definition.__module__.startswith("gradcam_worker."):
            continue
        source = inspect.getsource(definition)
        (tree,) = ast.parse(source).body
        for field, below in itertools.pairwise([*getattr(tree, "body", []), ast.Pass()]):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    meanings[name] = " ".join(text.split())
                case ast.AnnAssign(target=ast.Name(id=name)), _:
                    lines = source.splitlines()[field.lineno - 1 : field.end_lineno]
                    meanings[name] = next((line.split("  # ")[1] for line in lines if "  # " in line), "")
    return meanings


def _type(schema: Mapping[str, Any]) -> str:
    """The type and range of a field in words; models are links to their tables."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        title = TITLES.get(name, name)
        return f"[{title}](#{title.lower().replace(' ', '-')})"
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    if "type" not in schema:
        choices = schema.get("anyOf") or schema.get("oneOf", [])
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices if choice != {"type": "null"}))
    if schema["type"] == "object":
        return f"object: {_type(schema['additionalProperties'])}"
    if schema["type"] == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        return f"list{_size(schema, items)}: {_type(items[0])}"
    kind = SCALARS.get(schema.get("format", schema["type"]), schema["type"])
    return ", ".join(filter(None, (kind, _bounds(schema))))


def _size(schema: Mapping[str, Any], items: Sequence[Any]) -> str:
    if len(items) > 1:
        return f" of {len(items)}"
    limits = {"minItems": "at least", "maxItems": "at most"}
    sizes = [f"{words} {schema[key]}" for key, words in limits.items() if schema.get(key)]
    return f" ({', '.join(sizes)})" if sizes else ""


def _bounds(schema: Mapping[str, Any]) -> str:
    if pattern := schema.get("pattern"):
        return "a UUID or a ULID" if pattern == ID_PATTERN else f"`{pattern}`"
    if length := schema.get("maxLength"):
        return f"at most {_number(length)} characters"
    return " and ".join(f"{words} {_number(schema[key])}" for key, words in LIMITS.items() if key in schema)


def _number(value: float) -> str:
    return f"{value:,.15g}".replace(",", "\N{NO-BREAK SPACE}") if abs(value) >= GROUPED else f"{value:.15g}"


def _in_larger_units(name: str, value: float) -> str:
    """The same number in larger units, where that says more."""
    for suffix, size, unit in UNITS:
        if re.search(suffix, name) and value >= size:
            return f" ({value / size:g} {unit})"
    return ""


def _summary(kind: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"


def _table(layout: str, headings: Sequence[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table; `layout` names how it looks where the screen is narrow: see docs/stylesheets."""
    yield from ("", f'<div class="cards {layout}" markdown>', "")
    yield from (_row(headings), "|" + "---|" * len(headings))
    yield from map(_row, rows)
    yield from ("", "</div>")


def http_api() -> Iterator[str]:
    """docs/reference/http-api.md: every operation of the OpenAPI document."""
    document = openapi_document()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from ("", f"## {operation['summary']}", "", f"`{method.upper()} {path}`")
            yield from ("", operation.get("description", ""))
            given = [_parameter(one) for one in operation.get("parameters", ())]
            bodies = operation.get("requestBody", {}).get("content", {})
            given += [("body", f"`{kind}`", _schema_name(one["schema"])) for kind, one in bodies.items()]
            if given:
                yield from _table("parameters", ("parameter", "where", "meaning"), given)
            yield from _table("answers", ("status", "body", "meaning"), _answers(operation["responses"]))


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document of the gateway."""
    return create_app(Settings()).openapi()


def _parameter(parameter: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"`{parameter['name']}`", parameter["in"], parameter.get("description", "")


def _answers(responses: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A row for each answer, and one for all problems."""
    problems = []
    for status, answer in responses.items():
        if "application/problem+json" in answer.get("content", {}):
            problems.append(status)
        else:
            names = [_schema_name(content["schema"]) for content in answer.get("content", {}).values()]
            yield status, ", ".join(filter(None, names)), answer["description"]
    if problems:
        yield ", ".join(problems), "`RequestProblem`", "Why it was refused, or failed."


def _schema_name(schema: Mapping[str, Any]) -> str:
    """The name of a schema in the document; what has none is told by its meaning."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return f"`{name}`" if name else ""


PAGES: Mapping[str, Callable[[], Iterator[str]]] = {
    "settings.md": settings,
    "command-line.md": command_line,
    "http-api.md": http_api,
    "errors.md": error_codes,
    "metrics.md": metrics,
    "log-events.md": log_events,
    "wire-formats.md": wire_formats,
}


def page(name: str) -> str:
    """A page as it should be: what is written by hand, and below it what the code says."""
    by_hand, note, _ = (FOLDER / name).read_text(encoding="utf-8").partition(NOTE)
    return "\n".join([by_hand + note, *PAGES[name]()]) + "\n"


def main(arguments: list[str]) -> int:
    """Write the files; with --check, only name those that are not current. Return the exit code."""
    files = {FOLDER / name: page(name) for name in PAGES}
    for model, name, _ in DOCUMENTS.values():
        files[SCHEMAS / name] = json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n"
    values = json.loads(helm.VALUES.read_text(encoding="utf-8"))
    values["properties"]["settings"] = helm.settings_schema()
    files[helm.VALUES] = json.dumps(values, indent=2) + "\n"
    files[helm.CHART_ALERTS] = helm.ALERTS.read_text(encoding="utf-8")
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
    names = [str(path.relative_to(ROOT)) for path in stale]
    if "--check" in arguments:
        for name in names:
            print(f"{name} is not what the code says: run scripts/docs.", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    print(f"{len(files)} files, changed: {', '.join(names) or 'none'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
