"""Tables on a terminal of 80 columns."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from gradcam_worker.operations.terminal import console

WIDTH = 80


def test_a_table_that_is_too_wide_breaks_names_and_no_number_or_heading_of_numbers() -> None:
    headings = ("image", "folder", "rank", "id", "class", "probability", "deletion", "insertion")
    table = console.table(*headings, numbers=("rank", "id", "probability", "deletion", "insertion"))
    names = ("a-photo-with-a-long-name.jpg", "a-photo-with-a-long-name/")
    table.add_row(*names, "1", "285", "Egyptian_cat, not 281 tabby or 287 lynx", "80.9 %", "0.123", "0.456")
    shown = io.StringIO()
    Console(file=shown, width=WIDTH).print(table)
    heading, first, *_ = shown.getvalue().splitlines()
    assert {*headings[2:4], *headings[5:]} < {*heading.split()}
    assert first.split()[-4:] == ["80.9", "%", "0.123", "0.456"]
    assert max(map(len, shown.getvalue().splitlines())) <= WIDTH


def test_the_end_of_a_log_is_lines_and_no_escape_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "worker.log"
    log.write_text("".join(f"line {at}\n" for at in range(9)) + "[red]\x1b[2J\n")
    assert str(log) in console.show_log_end(log)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"line {at}" for at in range(4, 9)), r"[red]\x1b[2J"]
