"""Options that several commands share."""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from gradcam_worker.errors import GradcamError
from gradcam_worker.schemas.options import MethodSpec, Metric, default_target, is_default_target
from gradcam_worker.text import comma_lists

Command = TypeVar("Command", bound=Callable[..., Any])
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
DEFAULT_NETWORK = "efficientnet_lite0"
METHOD_OPTIONS = ("layer", "score", "normalize", "flip")
METHODS, SCORES, NORMALIZE = (
    get_args(MethodSpec.model_fields[name].annotation) for name in ("name", "score", "normalize")
)
BASELINES = get_args(get_args(MethodSpec.model_fields["baseline"].annotation)[0])

MASKING_OPTIONS = {  # of the methods that cover parts of the image: option, least value, help
    "masks": ("--masks", 2, "Of rise: number of masks, each of which costs a forward pass. [1024]"),
    "cells": ("--mask-cells", 2, "Of rise: cells of a mask along each side. [7]"),
    "seed": ("--seed", 0, "Of rise: of the random masks. [0]"),
    "window": (
        "--occlusion-window",
        1,
        "Of occlusion: side of the square, in pixels of the network's input. [a seventh of the shorter side]",
    ),
    "stride": (
        "--occlusion-stride",
        1,
        "Of occlusion: pixels between two positions of the square. [half of its side]",
    ),
}


# Parameters of `explanation_options` that become the `spec` of a command, beside the network.
OF_SPEC = {"top_n", "classes", "against", "method", "inputs", "artifacts", "metrics", *METHOD_OPTIONS} | {
    f"method_{name}" for name in (*MASKING_OPTIONS, "steps", "baseline")
}


def json_option(help_text: str = "Print JSON, for programs.") -> Callable[[Command], Command]:
    """The option `--json`, as the keyword argument `as_json`. Errors of its command are JSON, too."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether the words of a command line have `--json`, also where they are no correct command line."""
    return "--json" in itertools.takewhile(lambda word: word != "--", arguments)


def parse_duration(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """Click callback of a duration: `90s`, `30m`, `2h` or `7d`, as seconds; None: not given."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text.strip())
    if not match:
        message = f"{text!r} is not a duration: write 90s, 30m, 2h or 7d"
        raise click.BadParameter(message)
    return float(match[1]) * UNITS_S[match[2]]


def parse_comma_lists(
    _: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...] | None:
    """Click callback of an option that may be repeated, each value a list with commas; None: not given."""
    try:
        return tuple(name for value in values for name in comma_lists.parse(value)) if values else None
    except ValueError as error:
        raise click.BadParameter(str(error), param=option) from error


def parse_named(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Click callback of an option that may be repeated, each value as in `age=61`."""
    named: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest) or name in named:
            problem = "is given twice" if name in named else "is none of NAME=VALUE"
            message = f"{value!r} {problem}"
            raise click.BadParameter(message, param=option)
        named[name] = rest
    return named


def classes_option(help_text: str, name: str = "--classes") -> Callable[[Command], Command]:
    """The option `--classes`, or another list of classes, as a keyword argument; None: not given."""
    return click.option(name, metavar="A,B,...", multiple=True, callback=parse_comma_lists, help=help_text)


class _RunContext(click.Context):
    """Hides the name `run` in usage and error messages: users write `backfill INPUT`."""

    @property
    def command_path(self) -> str:
        """See `click.Context`."""
        return self.parent.command_path if self.parent else super().command_path


class RunCommand(click.Command):
    """The command of a `GroupWithRun` that is run without a name."""

    context_class = _RunContext


class GroupWithRun(click.Group):
    """Passes an argument that names no subcommand to `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Group`."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return [name for name in super().list_commands(ctx) if name != "run"]


def explanation_options(command: Command) -> Command:
    """Add the options that say what to explain, and how.

    Args:
        command: Receives them as the keyword argument `spec`: fields of a job.

    Returns:
        The command with these options.
    """

    @functools.wraps(command)
    def with_spec(
        *,
        network: str,
        top_n: int | None,
        classes: tuple[str, ...] | None,
        method: str | None,
        inputs: dict[str, str],
        artifacts: tuple[str, ...],
        metrics: tuple[str, ...],
        **others: Any,
    ) -> Any:
        how = {name: others.pop(name) for name in METHOD_OPTIONS}
        parameters = (*MASKING_OPTIONS, "steps", "baseline")
        chosen = {name: others.pop(f"method_{name}") for name in parameters} | {"name": method}
        against = others.pop("against")
        spec: dict[str, Any] = {
            "network": network,
            "target": _target(top_n, classes) | ({"against": [*against]} if against else {}),
            "method": how | {name: value for name, value in chosen.items() if value is not None},
            "metrics": metrics,
        }
        if inputs:
            spec["inputs"] = inputs
        if artifacts:
            spec["artifacts"] = [_artifact(artifact) for artifact in artifacts]
        return command(spec=spec, **others)

    for option in (
        json_option(),
        click.option(
            "--metric",
            "metrics",
            type=click.Choice(get_args(Metric)),
            multiple=True,
            help="Measure how well the heatmap explains the score; may be repeated.",
        ),
        click.option(
            "--artifact",
            "artifacts",
            metavar="KIND[:FORMAT]",
            multiple=True,
            help="Result to write: overlay, heatmap, grid, animation or report; may be repeated. "
            "[overlay heatmap]",
        ),
        classes_option(
            "Classes to explain, instead of --top-n: ids, wnids or names; may be repeated. "
            "Put a name with a comma in quotes: '\"crane, bird\"'."
        ),
        classes_option(
            "Explain each class against these: why it is that class and not one of them. --top-n then counts "
            "the other classes only.",
            "--against",
        ),
        click.option(
            "--top-n",
            type=click.IntRange(1, 1000),
            help="Explain the n most probable classes. [3, or all where there are fewer]",
        ),
        click.option(
            "--input",
            "inputs",
            metavar="NAME=VALUE",
            multiple=True,
            callback=parse_named,
            help="What the network takes beside the image, as in age=61; may be repeated.",
        ),
        click.option(
            "--flip/--no-flip",
            default=False,
            help="Average with the heatmap of the mirrored image: smoother.",
        ),
        click.option(
            "--normalize",
            type=click.Choice(NORMALIZE),
            default=NORMALIZE[0],
            show_default=True,
            help="Divide each heatmap by its own maximum, all by the highest maximum, or none.",
        ),
        click.option(
            "--score",
            type=click.Choice(SCORES),
            default=SCORES[0],
            show_default=True,
            help="The class score that is explained.",
        ),
        click.option(
            "--layer",
            help="Layer whose feature maps are used: a name, or auto to find one in the model. "
            "[the network's own]",
        ),
        click.option(
            "--baseline",
            "method_baseline",
            type=click.Choice(BASELINES),
            help="Of integrated_gradients: where the line to the image begins. [black]",
        ),
        click.option(
            "--steps",
            "method_steps",
            type=click.IntRange(8, 1024),
            help="Of integrated_gradients: each costs a forward and a backward pass. [64]",
        ),
        *(
            click.option(option, f"method_{name}", type=click.IntRange(least), help=help_text)
            for name, (option, least, help_text) in reversed(MASKING_OPTIONS.items())
        ),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            help="How the heatmap is computed. [gradcam; rise where the network only gives scores]",
        ),
        click.option(
            "--network",
            default=DEFAULT_NETWORK,
            show_default=True,
            help="The classifier; `gradcam networks` lists them.",
        ),
    ):
        with_spec = option(with_spec)
    return with_spec  # type: ignore[return-value]  # called only by click, with keyword arguments


def _artifact(text: str) -> dict[str, str]:
    """`overlay:png` -> an artifact's fields; `Job` checks kind and format."""
    kind, _, form = text.partition(":")
    return {"kind": kind, "format": form} if form else {"kind": kind}


def with_default_target(spec: dict[str, Any], networks: Path | None) -> dict[str, Any]:
    """Fill in how many classes are explained where the command line does not say which.

    Args:
        spec: Of `explanation_options`.
        networks: The registry of this machine. Workers may have another one: what it cannot tell does not
            count.

    Returns:
        The spec, with `top_n` or `classes`.
    """
    count = None
    if networks and is_default_target(spec["target"]):
        with contextlib.suppress(GradcamError, ImportError):
            from gradcam_worker.gradcam.registry.registry import Registry

            row = Registry(networks).find(spec["network"])
            count = len(row.labels) if row.labels else row.classes
    return {**spec, "target": default_target(spec["target"], count)}


def _target(top_n: int | None, classes: tuple[str, ...] | None) -> dict[str, Any]:
    """What the command line says; empty where it says nothing: see `with_default_target`."""
    if top_n and classes is not None:
        message = "give --top-n or --classes, not both"
        raise click.UsageError(message)
    if classes is None:
        return {"top_n": top_n} if top_n else {}
    return {"classes": list(classes)}
