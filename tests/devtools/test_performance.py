"""docs/explanation/performance.md, made from the committed documents of the benches."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from devtools.bench import page
from devtools.bench.page import DOCS, ON_PAGE, Incomplete
from devtools.bench.report import BENCHES, NothingToMeasure, load, plain, table

MEASURED = [name for name in ON_PAGE if (DOCS / "performance" / f"{name}.json").is_file()]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder as docs/explanation is, with the documents of every bench that was run."""
    shutil.copytree(DOCS / "performance", tmp_path / "performance")
    return tmp_path


def change(docs: Path, name: str, keys: tuple[str, ...], value: Any = None) -> Path:
    """Write another figure into a document; none: leave it out."""
    path = docs / "performance" / f"{name}.json"
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    if value is not None:
        inner[keys[-1]] = value
    path.write_text(json.dumps(document))
    return path


def written(docs: Path) -> str:
    page.write(docs)
    return (docs / "performance.md").read_text(encoding="utf-8")


def test_the_committed_page_is_what_the_committed_documents_say(docs: Path) -> None:
    assert written(docs) == (DOCS / "performance.md").read_text(encoding="utf-8"), "run scripts/performance"
    assert MEASURED, "there are documents"


def test_every_bench_has_its_section_and_those_that_were_run_their_figures(docs: Path) -> None:
    text = written(docs)
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "At a glance",
        *(load(name).TITLE for name in ON_PAGE),
        "Settled comparisons",
    ]
    assert text.count("It took ") == len(MEASURED)
    assert text.count("It has not been run") == len(ON_PAGE) - len(MEASURED)


def test_what_is_missed_is_called_missed(docs: Path) -> None:
    before = written(docs).count("**missed**")
    change(docs, "memory", ("growth",), 0.06)
    text = written(docs)
    assert text.count("**missed**") == before + 1
    assert re.search(r"resident memory: growth +\| at most 5% +\| \+6.0% +\| \*\*missed\*\*", text)


def test_remarks_stand_below_the_figures_that_they_are_about(docs: Path) -> None:
    (docs / "performance" / "host.md").write_text("Most of it is the checksum.\n")
    text = written(docs)
    assert text.index("## Host") < text.index("Most of it is the checksum.") < text.index("## Service")


def test_without_documents_nothing_is_said_to_have_been_measured(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert text.count("It has not been run") == len(ON_PAGE)
    assert "Required: 0; reached: 0." in text


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("engine", ("share_of_forward", "vgg16", "8", "8")),
        ("peers", ("times_peer",)),
        ("host", ("required_times_floor",)),
        ("service", ("device_idle", "vgg16")),
        ("latency", ("parts_s", "busy", "submit", "99")),
        ("memory", ("resident_mb",)),
        ("backfill", ("tracking", "1000000", "redis_mb")),
    ],
)
def test_a_document_without_a_figure_is_named_and_leaves_the_page_alone(
    docs: Path, name: str, keys: tuple[str, ...]
) -> None:
    path = change(docs, name, keys)
    said = rf"{re.escape(str(path))} .*'{keys[-1]}'.* scripts/performance --measure {name}"
    with pytest.raises(Incomplete, match=said):
        page.write(docs)
    assert not (docs / "performance.md").exists()


def test_a_word_where_a_number_belongs_is_refused_by_name(docs: Path) -> None:
    change(docs, "memory", ("growth",), "some")
    with pytest.raises(Incomplete, match=r"memory\.json is not what the page needs"):
        page.write(docs)


@pytest.mark.parametrize("text", ["", "[1]", '{"growth": 1'])
def test_what_is_no_document_is_refused_by_name(docs: Path, text: str) -> None:
    (docs / "performance" / "memory.json").write_text(text)
    with pytest.raises(Incomplete, match=r"memory\.json"):
        page.write(docs)


class TestMeasuring:
    def bench(self, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | Exception) -> None:
        def run(name: str, *, quick: bool) -> dict[str, Any]:
            assert not quick
            if isinstance(found, Exception):
                raise found
            return {"took_s": 1.0, **found}

        monkeypatch.setattr(page, "run", run)

    def test_a_document_is_kept_even_where_something_is_missed(
        self, docs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.bench(monkeypatch, {"passed": False})
        page.measure("memory", docs / "performance")
        assert json.loads((docs / "performance" / "memory.json").read_text()) == {
            "took_s": 1.0,
            "passed": False,
        }

    def test_a_bench_that_has_nothing_to_measure_leaves_no_document(
        self, docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.bench(monkeypatch, NothingToMeasure("There is no accelerator."))
        page.measure("gpu", docs / "performance")
        assert not (docs / "performance" / "gpu.json").exists()
        assert "There is no accelerator." in capsys.readouterr().out

    def test_a_bench_that_breaks_off_keeps_what_was_measured_before(
        self, docs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.bench(monkeypatch, RuntimeError("the worker hangs"))
        before = (docs / "performance" / "memory.json").read_bytes()
        with pytest.raises(RuntimeError, match="the worker hangs"):
            page.measure("memory", docs / "performance")
        assert (docs / "performance" / "memory.json").read_bytes() == before

    def test_a_bench_that_does_not_exist_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["performance", "--measure", "nothing"])
        with pytest.raises(SystemExit):
            page.main()


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_says_what_it_is_for_and_whose_versions_matter(name: str) -> None:
    bench = load(name)
    assert bench.TITLE
    assert bench.__doc__
    assert bench.PACKAGES


def test_a_figure_has_as_many_digits_as_it_deserves() -> None:
    assert [plain(value) for value in (0.966, 9.5, 12.34, 281.2)] == ["0.97", "9.50", "12.3", "281"]


def test_figures_stand_right_and_words_stand_left() -> None:
    rows = [("vgg16", "0.97", "1e-06", "70%", "the device"), ("xception", "", "2e-06", "8%", "0.4")]
    assert list(table(("a", "b", "c", "d", "e"), rows)) == [
        "| a        |    b |     c |   d | e          |",
        "| -------- | ---: | ----: | --: | ---------- |",
        "| vgg16    | 0.97 | 1e-06 | 70% | the device |",
        "| xception |      | 2e-06 |  8% | 0.4        |",
        "",
    ]
