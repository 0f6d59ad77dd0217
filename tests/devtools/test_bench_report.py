"""What every bench prints, and how it comes into its section of a page."""

import re
from pathlib import Path

import pytest

from devtools.bench.__main__ import PAGE
from devtools.bench.report import BENCHES, FIGURES, load, plain, table, write

SECTIONS = """# Performance

## Host

What a job costs.

| photo | ms |
| ----- | -: |
| small | 17 |

And then:

| a     | b |
| ----- | - |
| c     | d |

*Measured on 2 cores. It took
77 s.*

Most of it is the checksum.

## GPU

*Measured on no accelerator, yet.*
"""
FRESH = "| photo | ms |\n\n*Measured on 8 cores.*"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "performance.md"
    path.write_text(SECTIONS, encoding="utf-8")
    return path


def test_figures_replace_those_before_and_nothing_else(page: Path) -> None:
    write(page, "Host", FRESH)
    before, _, rest = SECTIONS.partition("| photo")
    after = rest.partition("77 s.*")[2]
    assert page.read_text(encoding="utf-8") == before + FRESH + after


def test_the_first_figures_replace_the_sentence_in_their_place(page: Path) -> None:
    write(page, "GPU", FRESH)
    assert page.read_text(encoding="utf-8").endswith(f"checksum.\n\n## GPU\n\n{FRESH}\n")


@pytest.mark.parametrize("title", ["Engine", "Most of it is the checksum."])
def test_a_section_that_there_is_not_is_refused_by_name_and_the_page_left_alone(
    page: Path, title: str
) -> None:
    with pytest.raises(LookupError, match=f"no section '{title}'"):
        write(page, title, FRESH)
    assert page.read_text(encoding="utf-8") == SECTIONS


def test_the_page_has_a_section_with_figures_for_every_bench() -> None:
    sections = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(texts) == [load(name).TITLE for name in BENCHES]
    for name, text in zip(BENCHES, texts.values(), strict=True):
        assert f"\n    scripts/bench {name}\n" in text
        assert len(FIGURES.findall(text)) == 1


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_says_what_it_is_for_and_whose_versions_matter(name: str) -> None:
    bench = load(name)
    assert bench.__doc__
    assert bench.PACKAGES


def test_a_figure_has_as_many_digits_as_it_deserves() -> None:
    assert [plain(value) for value in (0.966, 9.5, 12.34, 281.2)] == ["0.97", "9.50", "12.3", "281"]


def test_figures_stand_right_and_words_stand_left() -> None:
    rows = [("vgg16", "0.97", "1e-06", "70%", "the device"), ("xception", "", "2e-06", "8%", "0.4")]
    assert table(("a", "b", "c", "d", "e"), rows).splitlines() == [
        "| a        |    b |     c |   d | e          |",
        "| -------- | ---: | ----: | --: | ---------- |",
        "| vgg16    | 0.97 | 1e-06 | 70% | the device |",
        "| xception |      | 2e-06 |  8% | 0.4        |",
    ]
