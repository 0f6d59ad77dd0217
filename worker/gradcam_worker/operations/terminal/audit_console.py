"""What `gradcam audit` prints for people."""

from collections.abc import Sequence
from typing import TypeVar

from rich.table import Table

from gradcam_worker.audit.pages.page import PageSummary
from gradcam_worker.audit.report import CAUSE_TEXTS, CAUSES, AuditReport, Cause, ClassReport, Confusion
from gradcam_worker.gradcam.classes import percent
from gradcam_worker.operations.terminal.console import out, plain, table
from gradcam_worker.text.visible import counted

CAUSE_COLUMNS: dict[Cause, str] = {  # short: five of them beside each other
    "right_reason": "right",
    "wrong_reason": "right, wrong\nreason",
    "wrong_on_object": "wrong,\non object",
    "wrong_elsewhere": "wrong,\nelsewhere",
    "unknown": "unknown",
}
T = TypeVar("T")


def show_audit(report: AuditReport, max_lines: int) -> None:
    """Print a report: the confusions and classes with the most to learn, and what would make it say more.

    Args:
        report: The report.
        max_lines: Of each table.
    """
    dataset, basis = report.dataset, report.basis
    images, classes = counted(dataset.explained, "image"), counted(len(report.classes), "class", "classes")
    failed = f", {dataset.failed:,} failed" if dataset.failed else ""
    _line(f"{dataset.uri}: {images}{failed}, {classes}; {dataset.network}, layer {dataset.layer}")
    _line(
        f"Judged by boxes or masks: {basis.regions:,} images; by the typical heat of the class: "
        f"{basis.typical_heat:,}; not: {basis.nothing:,}."
    )
    if not dataset.complete:
        _line("There is no dataset.json: the backfill has not ended, and rows of its input are missing.")
    names = {one.id: _name(one) for one in report.classes}
    if report.confusions:
        shown, title = _first(report.confusions, max_lines, "confusions", report.confusions_left_out)
        out.print()
        out.print(_confusion_table(shown, names, title))
    _show_shortcuts(report, names, max_lines)
    taught = [one for one in report.classes if one.to_learn]
    if taught:
        shown_classes, title = _first(taught, max_lines, "classes", 0)
        out.print()
        out.print(_class_table(shown_classes, title, has_labels=bool(dataset.labelled)))
    for sentence in report.advice:
        out.print()
        _line(sentence)


def _show_shortcuts(report: AuditReport, names: dict[int, str], max_lines: int) -> None:
    """Print what the network needs beside the object, and what may be so."""
    masking = report.masking
    if report.shortcuts:
        headings = ("class", "looks at", "of its images", "right", "effect of masking it")
        shown, title = _first(report.shortcuts, max_lines, "shortcuts", 0, "surest effect")
        lines = table(*headings, title=title, numbers=headings[2:])
        for one in shown:
            low, high = one.confidence_interval
            effect = f"{one.effect:.2f} [{low:.2f}, {high:.2f}]"
            right = "" if one.accuracy is None else percent(one.accuracy)
            label = plain(names.get(one.class_id, str(one.class_id)))
            lines.add_row(label, one.place, percent(one.share), right, effect)
        out.print()
        out.print(lines)
    if report.suspects:
        some = counted(len(report.suspects), "possible shortcut was", "possible shortcuts were")
        first, why = report.suspects[0], masking.left_out or "there were too many, or images are gone"
        out.print()
        name = names.get(first.class_id, str(first.class_id))
        _line(f"{some} not tried on the network: {why}. The first: {name}, {first.place}.")
    if masking.suspects and masking.dropped:
        _line(f"Dropped, since masking them has no effect: {masking.dropped:,} of {masking.suspects:,}.")


def show_page(page: PageSummary | None) -> None:
    """Print what the page lacks, and until when its links are valid."""
    if page is None:
        return
    if page.missing:
        reasons = ", ".join(f"{code} {count:,}" for code, count in sorted(page.missing.items()))
        _line(f"Images that could not be fetched, shown as heatmaps only: {reasons}.")
    if page.expires_at:
        images = f" ({counted(page.links, 'image')})" if page.links else ""
        _line(f"Links of the page{images} are valid until {page.expires_at:%Y-%m-%d %H:%M} UTC.")
    _line(f"Page: index.html, {page.size / 1e6:.1f} MB, {counted(page.pictures, 'image')} embedded.")


def _confusion_table(confusions: Sequence[Confusion], names: dict[int, str], title: str) -> Table:
    lines = table("images", "of the class", "class", "taken for", "mostly", title=title, numbers=("images",))
    for one in confusions:
        cause = max(CAUSES, key=lambda each: one.causes.get(each, 0))
        text = f"{CAUSE_TEXTS[cause]}: {one.causes[cause]:,}"
        truth, predicted = (names.get(each, str(each)) for each in (one.truth, one.predicted))
        lines.add_row(f"{one.images:,}", percent(one.share), plain(truth), plain(predicted), text)
    return lines


def _class_table(classes: Sequence[ClassReport], title: str, *, has_labels: bool) -> Table:
    if not has_labels:
        lines = table("class", "images", "elsewhere", title=title, numbers=("images", "elsewhere"))
        for one in classes:
            lines.add_row(plain(_name(one)), f"{one.predicted:,}", f"{one.elsewhere:,}")
        return lines
    counts = [*CAUSE_COLUMNS.values(), "missed"]
    lines = table("class", *counts, title=title, numbers=counts)
    for one in classes:
        numbers = (*(one.causes.get(cause, 0) for cause in CAUSE_COLUMNS), one.missed)
        lines.add_row(plain(_name(one)), *(f"{number:,}" for number in numbers))
    return lines


def _first(
    found: Sequence[T], max_lines: int, what: str, left_out: int, order: str = "most to learn"
) -> tuple[Sequence[T], str]:
    """The first ones, and the title of their table."""
    count = len(found) + left_out
    few = f", {max_lines:,} of {count:,}" if count > max_lines else ""
    return found[:max_lines], f"{what.capitalize()} with the {order} first{few}"


def _name(one: ClassReport) -> str:
    return one.name.replace("_", " ") or f"class {one.id}"


def _line(text: str) -> None:
    out.print(plain(text), soft_wrap=True)
