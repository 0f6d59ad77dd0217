"""The command gradcam convert."""

import sys
from pathlib import Path

import click

from gradcam_worker.cli.options import json_option
from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.operations.terminal import console

GIB = 2**30


def _check_output(_: click.Context, option: click.Parameter, path: Path) -> Path:
    if path.suffix != ".keras":
        message = f"{path} must end in .keras"
        raise click.BadParameter(message, param=option)
    return path


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument(
    "output", metavar="OUT.keras", type=click.Path(dir_okay=False, path_type=Path), callback=_check_output
)
@click.option("--force", is_flag=True, help="Replace OUT.keras if it exists.")
@click.option(
    "--allow-code",
    is_flag=True,
    help="Let code that IN holds run in the child process: trust whoever made it.",
)
@click.option(
    "--import",
    "imports",
    multiple=True,
    metavar="MODULE",
    help="A module that you have installed, and that defines layers of IN; more than once for more.",
)
@click.option(
    "--input-size",
    nargs=2,
    type=click.IntRange(8, 8192),
    metavar="HEIGHT WIDTH",
    help="Size of the images, where the model takes any. [224 224]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True),
    default=1e-4,
    show_default=True,
    help="Largest difference between old and new outputs, as a share of their range.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(1),
    default=900,
    show_default=True,
    help="Seconds after which the child process is ended.",
)
@click.option(
    "--memory-gib",
    type=click.FloatRange(1),
    help="Memory of the child process. [6 and 16 times the size of IN]",
)
@json_option()
def convert(
    *,
    source: Path,
    output: Path,
    force: bool,
    allow_code: bool,
    imports: tuple[str, ...],
    input_size: tuple[int, int] | None,
    tolerance: float,
    timeout_s: float,
    memory_gib: float | None,
    as_json: bool,
) -> int:
    """Make a .keras file of a model in another format.

    IN is a whole model in HDF5 (.h5, .hdf5), a SavedModel (its folder), a .keras file of Keras 2, a .tflite
    file or a frozen graph (.pb). OUT.keras is written if both models compute the same for 21 images. A file
    that can run code is loaded only with your consent.

    \b
    Example:
      gradcam convert tumours.h5 tumours.keras
      gradcam convert saved_model/ tumours.keras --allow-code
    """
    from gradcam_worker.operations import convert as conversion

    if output.exists() and not force:
        message = f"{output} exists already: --force replaces it."
        raise NetworkIncompatible(message)
    request = conversion.Request(
        source, output, input_size, tolerance, timeout_s, int((memory_gib or 0) * GIB), force, imports
    )
    try:
        converted = conversion.convert(request, allow_code=allow_code)
    except conversion.NeedsConsent as question:
        if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            message = f"{source} {question}. If you trust whoever made it, convert it with --allow-code."
            raise NetworkIncompatible(message) from None
        console.err.print(console.plain(f"{source} {question}.", "yellow"), soft_wrap=True)
        click.confirm("Do you trust whoever made it, and convert it?", abort=True, err=True)
        converted = conversion.convert(request, allow_code=True)
    if as_json:
        console.print_json(converted)
    else:
        conversion.show(converted, request)
    return 0
