"""What native code writes to standard error, in processes of its own: a process has one standard error."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import cv2
import numpy as np
import pytest

from gradcam_worker.observability import native_output

FORGED = 'a\x1b[2J\r\u202e"}\n{"level": "critical", "message": "all is lost"}'
START = """
import os, sys, threading
from gradcam_worker.observability import native_output
from gradcam_worker.observability.logs import configure_logging, log_context
configure_logging(sys.argv[1], "info")
written = lambda text: os.write(2, text.encode())
with native_output.capture(sys.argv[2:]):
"""


def said_by(program: str, form: str = "json") -> tuple[int, list[str], list[str]]:
    """The exit code of a process that captures; its lines; those that its supervisor finds afterwards."""
    pipe = native_output.make_pipe()
    with os.fdopen(pipe.read_fd, "rb"), os.fdopen(pipe.write_fd, "wb") as childs_end:
        done = subprocess.run(
            [sys.executable, "-P", "-c", START + textwrap.indent(program, "    "), form, *map(str, pipe)],
            stderr=subprocess.PIPE,
            pass_fds=pipe,
            check=False,
        )
        childs_end.close()
        left = b"".join(iter(lambda: os.read(pipe.read_fd, 65_536), b""))
    return done.returncode, done.stderr.decode().splitlines(), left.decode().splitlines()


def events(program: str) -> list[dict[str, Any]]:
    code, lines, left = said_by(program)
    assert (code, left) == (0, [])
    return [json.loads(line) for line in lines]


def test_each_line_is_an_event_with_what_does_not_print_made_visible() -> None:
    first, second = events(f"written({FORGED!r})")
    assert (first["event"], first["level"]) == ("native_output", "warning")
    assert first["text"] == r'a\x1b[2J\r\u202e"}'
    assert second["text"].startswith('{"level": "critical"')


def test_as_text_no_line_is_forged() -> None:
    _, lines, _ = said_by(f"written({FORGED!r})", "text")
    assert len(lines) == 2
    assert all(" WARNING gradcam: native_output text=" in line and line.isprintable() for line in lines)


def test_what_is_written_while_one_image_is_decoded_names_its_job() -> None:
    first, second, third = events("""
with log_context(job_id="a", attempt=2), native_output.attributed("image/png"):
    written("no line's end")
with log_context(job_id="b"), native_output.attributed("image/png"):
    written("of b\\n")
written("of nobody")
""")
    assert (first["text"], first["job_id"], first["attempt"]) == ("no line's end", "a", 2)
    assert (second["text"], second["job_id"]) == ("of b", "b")
    assert "job_id" not in third
    assert third["pid"] == int(third["worker"].rpartition(":")[2])


ANOTHER_IS_DECODED = """
def decode_another():
    with log_context(job_id="b"), native_output.attributed("image/png"):
        entered.set()
        left.wait()
entered, left = threading.Event(), threading.Event()
thread = threading.Thread(target=decode_another)
thread.start()
entered.wait()
"""


def test_where_it_can_be_of_several_jobs_all_are_named() -> None:
    (event,) = events(
        ANOTHER_IS_DECODED
        + """with log_context(job_id="a"), native_output.attributed("image/png"):
    written("of one of them\\n")
left.set()
thread.join()
"""
    )
    assert event["job_ids"] == "a,b"


def test_a_librarys_words_tell_which_of_two_images_it_was() -> None:
    png, jpeg = events(
        ANOTHER_IS_DECODED
        + """for words in ("libpng warning: iCCP: too short\\n", "Corrupt JPEG data: premature end\\n"):
    with log_context(job_id="a"), native_output.attributed("image/jpeg"):
        written(words)
left.set()
thread.join()
"""
    )
    assert (png["job_id"], jpeg["job_id"]) == ("b", "a")


def test_a_flood_is_cut_and_blocks_no_writer() -> None:
    *lines, cut = events("""
with log_context(job_id="a"), native_output.attributed("image/png"):
    written("\\n".join(["x" * 2000] * 30) + "\\n")
""")
    assert len(lines) == native_output.MAX_LINES
    assert {len(line["text"]) for line in lines} == {native_output.MAX_LINE_LENGTH}
    assert (cut["event"], cut["lines"], cut["job_id"]) == ("native_output_cut", 10, "a")
    assert events("""
native_output._reader._lock.acquire()
try:
    while True:
        os.write(2, bytes(100_000))
except BlockingIOError:
    native_output._reader._lock.release()
""")


@pytest.mark.parametrize("pause_s", [0, 0.2])
def test_a_crash_is_logged_with_all_its_frames_by_whoever_reads_them_first(pause_s: float) -> None:
    frames = "".join(f"  File 'a.py', line {number} in f\n" for number in range(100))
    program = f"written({frames!r}); native_output._reader._thread.join({pause_s}); os.abort()"
    _, lines, left = said_by(program)
    logged = [json.loads(line)["text"] for line in lines]
    assert [text for text in (*logged, *left) if "in f" in text] == frames.splitlines()


@pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_what_a_process_writes_last_is_left_for_its_supervisor(end: str) -> None:
    """The thread that reads cannot have read it: it waits for the lock."""
    code, lines, left = said_by(f"native_output._reader._lock.acquire(); written('the reason\\n'); {end}")
    assert code != 0
    assert (lines, left[0]) == ([], "the reason")
    if "abort" in end:
        assert "Fatal Python error: Aborted" in left


def test_the_supervisor_logs_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    pipe = native_output.make_pipe()
    with os.fdopen(pipe.read_fd, "rb"), os.fdopen(pipe.write_fd, "wb"):
        os.write(pipe.write_fd, b"free(): invalid \x1b[31mpointer\n\nAborted \xff\n")
        native_output.log_last_output(pipe.read_fd, pid=7)
    assert [record.getMessage() for record in caplog.records] == [
        r'native_output text="free(): invalid \\x1b[31mpointer" pid=7',
        r'native_output text="Aborted \\xff" pid=7',
    ]


def test_where_the_system_does_not_let_pipes_be_copied_they_are_read() -> None:
    first, second = events("""
import ctypes, errno, time
def forbidden(*_):
    calls.append(ctypes.set_errno(errno.EPERM))
    return -1
calls = []
native_output._reader._tee = forbidden
written("one\\n")
time.sleep(0.3)
written(f"asked {len(calls)} times\\n")
""")
    assert first["text"] == "one"
    assert second["text"] in {"asked 1 times", "asked 2 times"}


def test_prints_tracebacks_and_the_log_go_where_they_went() -> None:
    code, lines, left = said_by(
        """
print("printed", file=sys.stderr)
thread = threading.Thread(target=lambda: int("no\\nnumber"))
thread.start()
thread.join()
raise SystemError("the end")
""",
        "text",
    )
    assert (code, left) == (1, [])
    assert lines[0] == "printed"
    assert sum("CRITICAL gradcam: uncaught_exception" in line for line in lines) == 2
    assert sum(line.startswith("    Traceback") for line in lines) == 2


def damaged_jpeg() -> bytes:
    """A JPEG that OpenCV decodes, and libjpeg complains about: it is sampled as no program does."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = bytearray(cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111])[1].tobytes())
    data[data.index(b"\xff\xc0") + 14] = 0x12  # of the second component
    return bytes(data)


def test_what_libjpeg_writes_about_an_image_is_an_event() -> None:
    (event,) = events(f"""
from gradcam_worker.gradcam.decoding.decode import Limits, decode
with log_context(job_id="a"):
    decode({damaged_jpeg()!r}, Limits(max_damage=1), native_output.attributed)
""")
    assert event["text"].startswith("Corrupt JPEG data: ")
    assert event["job_id"] == "a"
