import logging

import pytest

from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("abc", "abc"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("two words", '"two words"'),
        ("", '""'),
        ('says "no"', r'"says \"no\""'),
        ("a=b", '"a=b"'),
        ("line\nforged=1", r'"line\nforged=1"'),
        (3, "3"),
        (True, "True"),
        (1 / 3, "0.3333"),
        (12345678.0, "1.235e+07"),
        (["a", "b"], "a,b"),
        (("one of", 2), '"one of,2"'),
        (StorageUnavailable("The storage is away."), '"The storage is away."'),
        (KeyError(), "KeyError"),
    ],
    ids=repr,
)
def test_a_field_is_written_so_that_its_end_can_be_seen(
    value: object, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    log.warning("it_happened", first=value, second=2)
    (record,) = caplog.records
    assert record.getMessage() == f"it_happened first={shown} second=2"
    assert (record.levelname, record.name, record.funcName) == (
        "WARNING",
        "gradcam",
        "test_a_field_is_written_so_that_its_end_can_be_seen",
    )


def test_a_field_that_is_none_is_left_out_and_a_field_may_be_called_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log.error("nothing_to_say", why=None, event="succeeded")
    assert [one.getMessage() for one in caplog.records] == ["nothing_to_say event=succeeded"]


def test_what_is_below_the_level_is_not_even_written_out(caplog: pytest.LogCaptureFixture) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError

    with caplog.at_level(logging.WARNING, logger="gradcam"):
        log.debug("looked", at=Costly())
        log.info("looked", at=Costly())
    assert not caplog.records


def test_an_exception_has_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        log.exception("step_failed", step="fetch")
    (record,) = caplog.records
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    assert record.levelno == logging.ERROR
