"""`scripts/demo`, as a newcomer types it, and whatever may interrupt it."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gradcam_worker.gradcam.decoding.decode import decode

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
TIMEOUT_S = 200


def start(folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Start the demo. Every process that it starts inherits a TMPDIR by which it can be found."""
    scratch = folder / "scratch"
    scratch.mkdir()
    return subprocess.Popen(
        [str(DEMO), str(folder / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        # To convert a network, and to measure how many images to batch, takes seconds each.
        env={
            **os.environ,
            "TMPDIR": str(scratch),
            "PYTHONUNBUFFERED": "1",
            "GRADCAM_FORWARD": "tensorflow",
            "GRADCAM_MAX_BATCH": "8",
            **variables,
        },
    )


def left_behind(folder: Path) -> list[str]:
    """The command lines of all processes that the demo started and that still live."""
    mark = f"TMPDIR={folder / 'scratch'}\0".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes() + b"\0":
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile
            continue
    return found


def assert_nothing_is_left(folder: Path) -> None:
    end = time.monotonic() + 60
    while left := left_behind(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def read_until(demo: subprocess.Popen[str], text: str) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if text in line:
            return
    pytest.fail(f"the demo ended without saying {text!r}")


def test_the_demo_explains_five_photos_and_leaves_pictures(tmp_path: Path) -> None:
    with start(tmp_path) as demo:
        said, _ = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 0, said
    for expected in ("872  tripod", "967  espresso", "285  Egyptian_cat", "812  space_shuttle", "95.4 %"):
        assert expected in said
    assert len(re.findall(r"^s3://results/demo/[0-9a-f-]{36}/manifest.json$", said, re.MULTILINE)) == 6
    assert decode((tmp_path / "out" / "contact-sheet.jpg").read_bytes()).pixels.shape[1] > 1000
    assert len(list((tmp_path / "out").glob("*/overlay-*.jpg"))) == 5 * 3 + 2
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_demo_that_is_interrupted_stops_what_it_started(tmp_path: Path, name: str, code: int) -> None:
    with start(tmp_path) as demo:
        read_until(demo, "jobs are in the queue")
        demo.send_signal(getattr(signal, name))
        said, _ = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == code
    assert "Traceback" not in said
    assert_nothing_is_left(tmp_path)
    assert not list((tmp_path / "scratch").iterdir()), "temporary files are left"


def test_a_demo_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    with start(tmp_path) as demo:
        read_until(demo, "jobs are in the queue")
        demo.kill()
    assert_nothing_is_left(tmp_path)


def test_a_demo_whose_worker_cannot_start_says_why_and_stops(tmp_path: Path) -> None:
    with start(tmp_path, GRADCAM_THREAD="8") as demo:
        said, _ = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 1
    assert "Did you mean GRADCAM_THREADS?" in said
    assert "Traceback" not in said
    assert_nothing_is_left(tmp_path)
