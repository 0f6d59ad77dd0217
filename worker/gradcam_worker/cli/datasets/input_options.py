"""Options of `gradcam backfill` that say how INPUT is read, what its columns mean and what is left out."""

import functools
from typing import Any

import click

from gradcam_worker.backfill.inputs.options import BOX_FORMATS, FORMS, InputOptions
from gradcam_worker.cli.options import Command, parse_comma_lists, parse_named


def input_options(command: Command) -> Command:
    """Add the options of an input.

    Args:
        command: Receives them as the keyword argument `reading`.

    Returns:
        The command with these options.
    """

    @functools.wraps(command)
    def with_reading(
        *,
        form: str,
        column: str | None,
        input_columns: dict[str, str],
        keep_columns: tuple[str, ...] | None,
        drop_columns: tuple[str, ...] | None,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        **others: Any,
    ) -> Any:
        known = ("classes_from", "label", "label_map", "boxes", "boxes_format", "mask")
        reading = InputOptions(
            form=form,
            column=column,
            inputs=input_columns,
            include=include,
            exclude=exclude,
            keep=keep_columns,
            drop=drop_columns or (),
            **{name: others.pop(name) for name in known},
        )
        return command(reading=reading, **others)

    for option in (
        click.option(
            "--exclude",
            metavar="PATTERN",
            multiple=True,
            help="Leave out what matches, also a whole folder; may be repeated.",
        ),
        click.option(
            "--include",
            metavar="PATTERN",
            multiple=True,
            help="Only images whose name matches, as in '*.jpg', or whose path does, as in '2031/**/*.png'; "
            "may be repeated.",
        ),
        click.option(
            "--drop-columns",
            metavar="A,B,...",
            multiple=True,
            callback=parse_comma_lists,
            help="Columns of INPUT that the dataset does not get; names or patterns; may be repeated.",
        ),
        click.option(
            "--keep-columns",
            metavar="A,B,...",
            multiple=True,
            callback=parse_comma_lists,
            help="Columns of INPUT that the dataset gets; names or patterns; may be repeated. [all]",
        ),
        click.option(
            "--mask-column",
            "mask",
            metavar="COLUMN",
            help="Column with a mask of the object: a URI, or COCO's run lengths.",
        ),
        click.option(
            "--boxes-format",
            type=click.Choice(BOX_FORMATS),
            default=BOX_FORMATS[0],
            show_default=True,
            help="What the four numbers of a box are, in pixels or as shares of the image.",
        ),
        click.option(
            "--boxes",
            metavar="COLUMN",
            help="Column with the boxes of the objects, as JSON; four columns with commas; or a COCO "
            "annotation file, which ends in .json.",
        ),
        click.option(
            "--label-map",
            metavar="FILE",
            help="JSON object, or CSV of label,class: which class of the network each label of INPUT is.",
        ),
        click.option(
            "--label",
            metavar="COLUMN",
            help="Column with the true classes: ids, wnids or names, several with commas.",
        ),
        click.option(
            "--classes-from",
            metavar="COLUMN",
            help="Column with classes that are explained for its row, beside the others.",
        ),
        click.option(
            "--input-column",
            "input_columns",
            metavar="NAME=COLUMN",
            multiple=True,
            callback=parse_named,
            help="Column of INPUT with what the network takes beside the image, as in age=patient_age; may "
            "be repeated.",
        ),
        click.option("--column", help="Column of INPUT that holds the URIs."),
        click.option(
            "--format",
            "form",
            default=FORMS[0],
            help=f"Format of INPUT, if its name does not show it: {', '.join(FORMS[1:])}. [auto]",
        ),
    ):
        with_reading = option(with_reading)
    return with_reading  # type: ignore[return-value]  # called only by click, with keyword arguments
