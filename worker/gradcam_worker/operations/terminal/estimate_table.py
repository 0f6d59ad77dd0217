"""Prints what a dry run of a backfill has found."""

from datetime import timedelta

from gradcam_worker.operations.terminal import console
from gradcam_worker.operations.trial import Estimate, Listing, Measurement
from gradcam_worker.text.visible import counted

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
STEP = 1000


def show_estimate(listing: Listing, measured: Measurement | None, estimate: Estimate | None) -> None:
    """Print what was read, what was measured, and what follows for the whole input.

    Args:
        listing: What was read of the input.
        measured: What the trial measured; None: no worker is alive.
        estimate: What follows; None: the number of rows is not known, or nothing was measured.
    """
    facts = console.table("", "")
    facts.show_header = False
    read = "all of the input" if listing.whole else "of the input, as many as 20 s allow"
    facts.add_row("read", f"{counted(listing.rows, 'row')}, {read}")
    for code, count in listing.unreadable.items():
        facts.add_row("", console.plain(f"{count:,} {code}", "red"))
    if measured:
        tried = f"{counted(measured.rows, 'row')} by {counted(measured.workers, 'worker')}"
        loading = ", with the loading of the network" if measured.includes_loading else ""
        facts.add_row("measured", f"{tried}: {measured.rows_per_s:,.1f} rows/s{loading}")
        for code, count in measured.failed.items():
            facts.add_row("", console.plain(f"{count:,} {code}", "red"))
    if estimate:
        about = "" if listing.whole else "about "
        facts.add_row(
            "extrapolated", f"{about}{estimate.rows:,} rows, about {estimate.failed:,} of them fail"
        )
        facts.add_row("", f"{timedelta(seconds=round(estimate.seconds))} on the workers that are alive")
        facts.add_row("", f"{estimate.device_hours:,.2f} device-hours")
        facts.add_row("", f"{estimate.objects:,} objects, {_size_text(estimate.bytes)}")
        if estimate.price is not None:
            facts.add_row("", f"price {estimate.price:,.2f}")
    elif measured:
        facts.add_row("extrapolated", "nothing: the number of rows is known only when all are read")
    console.out.print(facts)


def _size_text(size: float) -> str:
    for unit in UNITS[:-1]:
        if size < STEP:
            return f"{size:,.0f} {unit}"
        size /= STEP
    return f"{size:,.0f} {UNITS[-1]}"
