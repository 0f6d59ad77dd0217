import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gradcam_worker.errors import ImageFetchFailed
from gradcam_worker.observability.logs import (
    TEXT_FORMAT,
    ContextThreadPool,
    JsonFormatter,
    LineFormatter,
    log_context,
)
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.text.log_events import EventLogger

HOSTILE = [
    'a\n{"level": "critical", "message": "all is lost"}',
    "a\r\nb\x85c\u2028d",
    "\x1b[2J\x1b]0;title\x07\x9b31m",
    "\u202egnp.exe\u200b",
    "half \ud800 a sign",
    '{0} %s ${x} "quoted" \\ </script>',
]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger that writes JSON, and what it has written."""
    written, logger = io.StringIO(), logging.getLogger("gradcam.json")
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter("host:1"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # whatever a test before has set for all
    yield logger, written
    logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def fail(text: str) -> None:
    raise ValueError(text)


def test_a_line_is_one_object_with_a_time_in_utc(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = log
    logger.warning("job %s waits", 7)
    (said,) = lines(written)
    assert re.fullmatch(TIME, said.pop("time"))
    assert said == {
        "level": "warning",
        "logger": "gradcam.json",
        "message": "job 7 waits",
        "worker": "host:1",
    }


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


UNWRITABLE = {
    "nan": float("nan"),
    "infinite": float("-inf"),
    "large": 10**30,
    "endless": 10**5000,
    "speechless": Speechless(),
    "listed": [Speechless()],
}


def refuse_constant(name: str) -> None:
    pytest.fail(f"{name} is not JSON")


def test_a_line_is_json_that_every_reader_takes_whatever_the_value_of_a_field(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    _, written = log
    with log_context(since_s=float("inf")):
        EventLogger("gradcam.json").warning("job_late", attempt=2, ratio=0.5, **UNWRITABLE)
    said = json.loads(written.getvalue(), parse_constant=refuse_constant)
    assert (said["attempt"], said["ratio"]) == (2, 0.5)
    shown = {name: said[name] for name in ("since_s", "nan", "infinite", "large")}
    assert shown == {"since_s": "inf", "nan": "nan", "infinite": "-inf", "large": str(10**30)}
    assert said["speechless"] == said["listed"] == "<Speechless: its str() raises RuntimeError>"


def test_a_traceback_of_an_error_without_text_is_written(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = log
    logger.error("it failed", exc_info=Speechless())
    (said,) = lines(written)
    assert said["exception"]["message"] == "<Speechless: its str() raises RuntimeError>"


@pytest.mark.parametrize(
    ("message", "values"),
    [("to %s %d", ("redis://:planted@h/0",)), ("to %s", (Speechless(),)), (Speechless(), ())],
    ids=("another number of values", "a value without text", "no text at all"),
)
@pytest.mark.parametrize(
    "formatter", [JsonFormatter("host:1"), LineFormatter(TEXT_FORMAT)], ids=("json", "text")
)
def test_what_cannot_be_formatted_is_written_without_secrets(
    capsys: pytest.CaptureFixture[str],
    formatter: logging.Formatter,
    message: object,
    values: tuple[object, ...],
) -> None:
    written, logger = io.StringIO(), logging.Logger("unformatted")  # noqa: LOG001  # pytest formats the others
    handler = logging.StreamHandler(written)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.warning(message, *values)
    (line,) = written.getvalue().splitlines()
    assert "Speechless" in line or "redis://...@h/0" in line
    assert "planted" not in line
    assert capsys.readouterr().err == "", "logging has printed what it could not write"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_whatever_a_job_says_is_one_line_of_ascii(log: tuple[logging.Logger, io.StringIO], text: str) -> None:
    logger, written = log
    with log_context(job_id=text):
        try:
            fail(text)
        except ValueError:
            logger.exception("it says %s", text)
    (line,) = written.getvalue().split("\n")[:-1]
    assert line.isascii()
    assert line.isprintable()
    shown = text.encode(errors="backslashreplace").decode()
    said = json.loads(line)
    assert (said["message"], said["job_id"]) == (f"it says {shown}", shown)
    assert (said["exception"]["type"], said["exception"]["message"]) == ("ValueError", shown)
    assert "in fail\n" in said["exception"]["stack"], "the stack is one string"


def test_what_is_said_while_a_job_runs_carries_its_fields_and_nothing_does_after_it(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, written = log
    with log_context(job_id="a"), log_context(attempt=2, trace_id=None):
        logger.info("ignored")
        logger.error("within")
    logger.error("after")
    within, after = lines(written)
    assert (within["job_id"], within["attempt"], "trace_id" in within) == ("a", 2, False)
    assert not after.keys() & {"job_id", "attempt"}


def test_threads_of_a_pool_speak_for_the_job_that_asked_them_and_each_for_its_own(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, written = log
    met = threading.Barrier(2)

    def work(name: str) -> str:
        met.wait(10)  # both are under way at once
        logger.error(name)
        return name

    with ContextThreadPool(2) as pool:
        with log_context(job_id="a"):
            first = pool.submit(work, "of a")
        with log_context(job_id="b"):
            assert list(pool.map(work, ["of b"])) == ["of b"]
        assert first.result() == "of a"
        pool.submit(logger.error, "of nobody").result()
    assert {line["message"]: line.get("job_id") for line in lines(written)} == {
        "of a": "a",
        "of b": "b",
        "of nobody": None,
    }


def spoken(form: str, level: str, statements: str) -> list[str]:
    """What a fresh process that logs so says."""
    program = f"""
import logging, threading, warnings
from gradcam_worker.observability.logs import configure_logging
configure_logging({form!r}, {level!r})
{statements}
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    return done.stderr.splitlines()


LEVELS = ["debug", "info", "warning", "error"]
SAY = f"""
for name in ("gradcam", "botocore"):
    for one in {LEVELS}:
        getattr(logging.getLogger(name), one)(one)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_from_its_level_on_all_is_said_but_what_libraries_say_in_debug(level: str) -> None:
    said = [json.loads(line) for line in spoken("json", level, SAY)]
    heard = LEVELS[LEVELS.index(level) :]
    assert [one["level"] for one in said if one["logger"] == "gradcam"] == heard
    assert [one["level"] for one in said if one["logger"] == "botocore"] == [
        one for one in heard if one != "debug"
    ], "theirs may show a secret"


def test_text_stays_as_it_is() -> None:
    (line,) = spoken("text", "info", r"logging.getLogger('gradcam').info('a\nb')")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO gradcam: a\\nb", line)


def test_a_warning_and_what_nobody_caught_are_objects_too() -> None:
    program = """
warnings.warn("old")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
class Odd:
    def __del__(self): 1 / 0
Odd()
logging.getLogger("library").info("%d of %d", 1)
raise SystemError("the end")
"""
    warned, died, odd, wrong, ended = [json.loads(line) for line in spoken("json", "info", program)]
    assert (warned["logger"], "UserWarning: old" in warned["message"]) == ("py.warnings", True)
    assert (died["level"], died["exception"]["type"]) == ("critical", "ZeroDivisionError")
    assert odd["exception"]["type"] == "ZeroDivisionError"
    assert wrong["message"] == "%d of %d (1,)"
    assert (ended["exception"]["type"], ended["exception"]["message"]) == ("SystemError", "the end")


def test_what_storage_says_in_its_own_threads_names_the_job(
    log: tuple[logging.Logger, io.StringIO], free_port: int
) -> None:
    handler, ours = log[0].handlers[0], logging.getLogger("gradcam")
    ours.addHandler(handler)
    level = ours.level
    ours.setLevel("INFO")
    keys: dict[str, Any] = {"s3_access_key_id": "testing", "s3_secret_access_key": "testing"}
    away = S3(Settings(s3_endpoint_url=f"http://127.0.0.1:{free_port}", fetch_timeout_s=0.5, **keys))
    try:
        with log_context(job_id="a"), pytest.raises(ImageFetchFailed):
            away.read_image("photos", "cat.jpg", 1000, Deadline(5))
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
    (said,) = [one for one in lines(log[1]) if one.get("event") == "obstore_failed"]
    assert said["job_id"] == "a"


def test_an_event_is_an_object_that_has_its_name_and_fields(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, written = log
    events = EventLogger(logger.name)
    with log_context(job_id="a"):
        events.warning("image_refused", uri="https://u:secret@host/x", tries=2, level="an own field")
    (line,) = lines(written)
    assert (line["event"], line["tries"], line["job_id"]) == ("image_refused", 2, "a")
    assert "secret" not in written.getvalue()
    assert line["level"] == "warning", "a field replaces none of the line's own"
