import io
import logging

import pytest
from rich.console import Console

from gradcam_worker.errors import ImageFetchFailed
from gradcam_worker.ledger.state_machine import new_document
from gradcam_worker.observability.logs import TEXT_FORMAT, LineFormatter, log_context
from gradcam_worker.operations.terminal import console
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import ClassScore, NetworkRef, Problem, StatusDocument
from gradcam_worker.text.log_events import EventMessage
from gradcam_worker.text.visible import abridged, counted, visible

FORGED = "2026-01-01 00:00:00,000 CRITICAL gradcam: all is lost"
HOSTILE = [
    f"a\n{FORGED}",
    f"a\r{FORGED}",
    f"a\r\n{FORGED}",
    f"a\v{FORGED}",
    f"a\x85{FORGED}",
    f"a\u2028{FORGED}",
    "\x1b[2J\x1b[1;31mred\x1b]0;title\x07",
    "\x9b31m",  # the same as ESC [ to some terminals
    "\b\b\b\b",
    "\0",
    "\u202egnp.exe",
    "\u2066isolated\u2069",
    "a\u200bb",
    "\ud800",
    "[red]markup[/]",
    "{0} %s %(message)s ${x} {{7*7}}",
    "=cmd|' /C calc'!A1",
]
PRINTS = "straße 🦔 日本語 [red] %s {} \\ '\""


@pytest.fixture
def log() -> tuple[logging.Logger, io.StringIO]:
    """A logger that writes as a worker does, and what it has written."""
    written, logger = io.StringIO(), logging.Logger("gradcam.line")  # noqa: LOG001  # pytest keeps none of it
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter(TEXT_FORMAT))
    logger.addHandler(handler)
    return logger, written


def fail(text: str) -> None:
    raise ValueError(text)


def acts(text: str) -> set[str]:
    """What of a text would do something on a terminal, or cannot be seen."""
    return {sign for sign in text if not sign.isprintable()}


def test_what_prints_is_left_as_it_is() -> None:
    assert visible(PRINTS) == PRINTS


def test_what_does_not_print_is_seen_as_its_escape() -> None:
    assert visible("a\nb\x1b[0m\u202e\0\ud800") == r"a\nb\x1b[0m\u202e\x00\ud800"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_message_is_one_line_whatever_a_job_says(
    log: tuple[logging.Logger, io.StringIO], text: str
) -> None:
    logger, written = log
    logger.warning("job %s waits: %s", "1", text)
    (line,) = written.getvalue().split("\n")[:-1]
    assert not acts(line)
    assert not written.getvalue().count(f"\n{FORGED}")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_line_of_a_traceback_looks_like_a_line_of_its_own(
    log: tuple[logging.Logger, io.StringIO], text: str
) -> None:
    logger, written = log
    try:
        fail(text)
    except ValueError:
        logger.exception("unforeseen", stack_info=True)
    first, *below = written.getvalue().split("\n")[:-1]
    assert first.endswith("ERROR gradcam.line: unforeseen")
    assert all(line.startswith("    ") for line in below)
    assert not acts("".join(below))
    assert "ValueError: " in written.getvalue()


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_document_shown_on_a_terminal_acts_on_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=written, width=200, color_system=None))
    problem = Problem.of(ImageFetchFailed(text), stage="fetch", attempt=1)
    seen = ClassScore(rank=1, id=1, wnid=text, name=text, probability=0.5)
    network = NetworkRef(name=text, layer=text, weights_sha256=None)
    changes = {"error": problem, "predictions": (seen,), "network": network, "metadata": {text: text}}
    document: StatusDocument = new_document(new_id()).model_copy(update=changes)
    console.show_status(document)
    lines = written.getvalue().split("\n")
    assert not acts("".join(lines))
    assert not [line for line in lines if line.startswith(FORGED[:10])]
    assert visible(text)[:10] in written.getvalue(), "and it can be read"


def test_json_for_machines_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json(HOSTILE)
    assert capsys.readouterr().out.isascii()


def test_a_long_text_keeps_its_beginning_and_its_end_on_one_line() -> None:
    text = "\x1b[1mbegins\x1b[0m\n" + "middle " * 1000 + "\nends"
    told = abridged(text, 100)
    assert told.startswith("begins middle ")
    assert " [...] " in told
    assert told.endswith("middle ends")
    assert len(told) == 100
    assert abridged("a  short\n one", 100) == "a short one"
    assert abridged("x" * 100, 100) == "x" * 100


def test_one_is_not_many() -> None:
    assert [counted(number, "worker") for number in (0, 1, 2000)] == [
        "0 workers",
        "1 worker",
        "2,000 workers",
    ]
    assert [counted(number, "shard is", "shards are") for number in (1, 2)] == ["1 shard is", "2 shards are"]


def test_an_event_is_followed_by_its_fields_and_by_whose_job_it_is_of(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, written = log
    with log_context(job_id="a", attempt=2):
        logger.warning(EventMessage("row_refused", {"attempt": 1, "why": f"no image\n{FORGED}"}))
        logger.warning("of a library")
    first, second = written.getvalue().splitlines()
    assert r'row_refused attempt=1 why="no image\n2026-01-01' in first
    assert first.endswith(" job_id=a")
    assert second.endswith(": of a library")


def test_an_event_forges_nothing_where_a_program_does_not_configure_its_logs() -> None:
    for text in HOSTILE:
        for value in (text, f"{text} with a space"):
            assert acts(str(EventMessage("event", {"field": value}))) == set(), value
