"""Tables on a terminal of 80 columns."""

import io

from rich.console import Console

from gradcam_worker.operations import console

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
