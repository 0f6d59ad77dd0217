"""The command `scripts/bench`."""

import json
import signal
import sys

import click

from devtools import ROOT
from devtools.bench.report import BENCHES, NothingToMeasure, in_markdown, load, run, write
from gradcam_worker import extras
from gradcam_worker.operations.signals import exit_on_sigterm

PAGE = ROOT / "docs" / "explanation" / "performance.md"


@click.command("scripts/bench")
@click.argument("bench", type=click.Choice(BENCHES))
@click.option("--quick", is_flag=True, help="A first look: fewer repeats, fewer cases.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.option("--write", "writes", is_flag=True, help=f"Write the figures into {PAGE.name}.")
def main(bench: str, *, quick: bool, as_json: bool, writes: bool) -> None:
    """Measure, and print the figures.

    Exit code 1: what is required is missed, or the bench failed; 2: there is nothing here to be measured.
    """
    extras.run_as_command()
    try:
        figures = run(bench, quick=quick)
    except NothingToMeasure as error:
        click.echo(json.dumps({"device": None, "why": str(error)}) if as_json else error)
        sys.exit(2)
    text = in_markdown(bench, figures)
    click.echo(json.dumps(figures, indent=2) if as_json else text)
    if writes:
        write(PAGE, load(bench).TITLE, text)
    sys.exit(0 if figures["passed"] else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, exit_on_sigterm)  # the servers and workers of a bench stop with it
    main()
