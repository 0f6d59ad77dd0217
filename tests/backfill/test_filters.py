"""Patterns of names, and what is hidden or only a marker."""

from pathlib import Path

import pytest

from gradcam_worker.backfill.inputs.filters import NameFilter, pattern
from gradcam_worker.backfill.inputs.open import open_input
from gradcam_worker.backfill.inputs.options import InputOptions
from gradcam_worker.errors import InvalidInput
from gradcam_worker.settings import Settings


@pytest.mark.parametrize(
    ("glob", "matching", "others"),
    [
        (
            "*.jpg",
            ["a.jpg", "x/y/a.jpg", "x.jpg/y.png"],
            ["a.jpeg", "a.jpg.txt", ".jpg", "x/.a.jpg", ".x/a.jpg"],
        ),
        ("cats", ["cats", "cats/a", "x/cats/y/a"], ["cats2", "x/mycats"]),
        ("2031/*.png", ["2031/a.png"], ["2031/x/a.png", "x/2031/a.png"]),
        ("/a.png", ["a.png"], ["x/a.png"]),
        ("2031", ["2031/x/a.png"], ["20310/a.png"]),
        ("2031/**/a.png", ["2031/a.png", "2031/x/y/a.png"], ["2031/x/b.png"]),
        ("2031/**", ["2031/a", "2031/x/y/a"], ["2032/a", "2031"]),
        ("raw/2031", ["raw/2031/x/a.png"], ["x/raw/2031/a.png"]),
        ("a?[0-9][!x].png", ["ab1y.png"], ["ab1x.png", "abcy.png", "a/1y.png"]),
        (".thumbs/*", [".thumbs/a"], ["x/.thumbs/a", "thumbs/a"]),
        ("a[!x]b", ["ayb"], ["a/b", "axb"]),
        ("*a*b?*c", ["xaybzc", "ab.c"], ["abc", "bazc"]),
        ("x/**/y/**/z/*", ["x/y/z/a", "x/1/y/y/2/z/a"], ["x/y/a", "x/z/y/a"]),
        ("**/**/a", ["a", "x/a", "x/y/z/a"], ["b"]),
        ("a+(1)$.png", ["a+(1)$.png"], ["aa1.png"]),
        ("a[.png", ["a[.png"], ["a.png"]),
    ],
)
def test_a_pattern_is_one_of_a_shell(glob: str, matching: list[str], others: list[str]) -> None:
    compiled = pattern([glob])
    assert compiled
    assert [name for name in matching if not compiled.fullmatch(name)] == []
    assert [name for name in others if compiled.fullmatch(name)] == []


@pytest.mark.parametrize(
    ("glob", "name"),
    [("*a" * 30 + "b", "a" * 900), ("**/a/" * 30 + "b", "a/" * 400 + "c"), ("**/" * 30 + "b", "a/" * 400)],
)
def test_a_pattern_with_many_stars_is_decided_at_once(glob: str, name: str) -> None:
    compiled = pattern([glob])
    assert compiled
    assert not compiled.fullmatch(name), "else this test does not end"


def test_what_is_no_pattern_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidInput, match=r"'\[z-a\]' is no pattern: bad character range z-a; one is as"),
        open_input(str(tmp_path), Settings(), InputOptions(exclude=("a", "[z-a]"))),
    ):
        pass


def test_what_is_left_out_is_counted_by_its_reason() -> None:
    names = NameFilter(["*.jpg", "*.png"], ["raw", "*/bad_*"], lambda name: name.startswith("b/out/"))
    given = ["a.jpg", "raw/a.jpg", "x/bad_1.jpg", "a.txt", "x/_SUCCESS", ".a.jpg", "out/a.jpg", "x/b.png"]
    assert [name for name in given if not names.skips(name, f"b/{name}")] == ["a.jpg", "x/b.png"]
    assert names.notes() == [
        "Skipped 1 file: hidden, or a marker such as _SUCCESS.",
        "Skipped 1 file of the input that a backfill wrote, or below the output.",
        "Skipped 4 files by --include and --exclude.",
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("_SUCCESS", "x/_SUCCESS", ".DS_Store", "x/Thumbs.db", "x/.a.jpg.crc", "a.crc", ".git/a.jpg"),
        *(
            "x/_temporary/0/a.jpg",
            "_delta_log/0.json",
            "_committed_12",
            "x_$folder$",
            "x/desktop.ini",
            "._a.jpg",
        ),
    ],
)
def test_hidden_files_and_markers_are_left_out_by_default(name: str) -> None:
    assert NameFilter().skips(name, name)


@pytest.mark.parametrize("name", ["a", "x/_a.jpg", "a.crc/b", "..", "../a.jpg", "x/./a", "a.", "_SUCCESSFUL"])
def test_no_others_are(name: str) -> None:
    assert not NameFilter().skips(name, name)


def test_hidden_files_are_there_where_a_pattern_names_them(tmp_path: Path) -> None:
    for name in (".thumbs/a.jpg", ".thumbs/.DS_Store", ".git/b.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    with open_input(str(tmp_path), Settings(), InputOptions(include=(".thumbs/*", "*.jpg"))) as opened:
        found = [row.uri.removeprefix(f"file://{tmp_path}/") for row in opened.rows()]
    assert found == [".thumbs/a.jpg", "c.jpg"]


def test_rows_of_a_list_are_left_out_by_the_paths_of_their_uris(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "uri\ns3://b/cats/1%2.jpg\nhttps://h/cats/2%20.jpg?x=/dogs/\ns3://b/dogs/3.jpg\nnothing\ndata:text/plain;x\n"
    )
    with open_input(str(tmp_path / "a.csv"), Settings(), InputOptions(include=("cats/*",))) as opened:
        found = [row.uri for row in opened.rows()]
    assert found == ["s3://b/cats/1%2.jpg", "https://h/cats/2%20.jpg?x=/dogs/", "nothing"]
    assert opened.notes() == ["Skipped 2 files by --include and --exclude."]
