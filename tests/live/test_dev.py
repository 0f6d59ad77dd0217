"""`gradcam dev`, and the examples by the two lines that their page gives."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "docs" / "tutorial" / "web-app.md"
PROGRAMS = Path(sys.executable).parent
TIMEOUT_S = 120


def until(met: Callable[[], object], log: Path) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not met():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, follow_redirects=True).status_code == 200
    except httpx.TransportError:
        return False


class Development:
    """`gradcam dev` in a folder, at a port that nobody else uses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.port = folder, folder / "said.txt", servers.free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, until_ready: bool = True) -> None:
        command = [str(PROGRAMS / "gradcam"), "dev", "gradcam-dev", "--port", str(self.port)]
        variables = {**os.environ, "TMPDIR": str(self.folder), "GRADCAM_THREADS": "4"}
        # To convert a network, and to measure how many images to batch, takes seconds each.
        variables |= {"GRADCAM_FORWARD": "tensorflow", "GRADCAM_MAX_BATCH": "8"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=variables, stdout=output, stderr=output, start_new_session=True
            )
        said = b"Ready" if until_ready else b"For your app"  # before that worker and HTTP API have started
        until(lambda: said in self.log.read_bytes() or self.process.poll() is not None, self.log)  # type: ignore[union-attr]
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> int:
        assert self.process
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    @property
    def settings(self) -> Settings:
        """What the environment file says, as a shell reads it."""
        told = subprocess.check_output(
            ["bash", "-c", "set -a; source gradcam-dev/environment; env"], cwd=self.folder, text=True
        )
        lines = [line.partition("=") for line in told.splitlines()]
        return Settings.from_environment({name: value for name, _, value in lines if "GRADCAM_" in name})

    def left(self) -> list[str]:
        """What still runs of what was started."""
        mark, found = f"TMPDIR={self.folder}\0".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # ended meanwhile
                continue
        return found


@pytest.fixture(scope="module")
def development(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Development]:
    development = Development(tmp_path_factory.mktemp("dev"))
    development.start()
    try:
        yield development
    finally:
        if development.process and development.process.poll() is None:
            development.stop()


def lines_of(program: str, ports: dict[str, int]) -> str:
    """The two lines of the lesson that start a program, with other ports."""
    blocks = re.findall(r"^```bash\n(.*?)^```", LESSON.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if program in block]
    assert len(block.splitlines()) == 2
    for port, other in ports.items():
        block = block.replace(port, str(other))
    return str(block).replace("docs/examples", str(ROOT / "docs" / "examples"))


@pytest.mark.parametrize("program", ["fastapi_app", "django_app"])
def test_an_example_starts_by_the_two_lines_of_the_lesson(development: Development, program: str) -> None:
    port = development.port + 1 if program == "django_app" else servers.free_port()
    log = development.folder / f"{program}.txt"
    variables = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "TRY_PORT": str(port)}
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-euc", lines_of(program, {"8002": port})],
            cwd=development.folder,
            env=variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/"), log)
        if program == "django_app":
            assert re.search(r"as admin with the password \S{12}", log.read_text())
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(30)


def test_a_port_or_a_folder_in_use_is_named(development: Development, silent_port: int) -> None:
    for words, said in (
        (["--port", str(silent_port)], f"Port {silent_port} of 127.0.0.1 is in use: choose another one"),
        (
            ["gradcam-dev", "--port", str(servers.free_port())],
            "Another gradcam dev uses gradcam-dev/: choose",
        ),
    ):
        done = subprocess.run(
            [PROGRAMS / "gradcam", "dev", *words],
            cwd=development.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert said in done.stderr


def test_jobs_are_explained_and_kept_and_nothing_is_left_running(
    development: Development, photos: Path
) -> None:
    url = f"http://127.0.0.1:{development.port}"
    answer = httpx.post(
        f"{url}/v1/jobs",
        json={"image": "s3://photos/cat.jpg", "network": "efficientnet_lite0", "target": {"top_n": 1}},
        headers={"Prefer": "wait=60"},
        timeout=90,
    )
    with GradcamClient(settings=development.settings) as client:
        document = client.wait(answer.json()["id"])
        assert document.predictions[0].name == "Egyptian_cat"
        fields: Any = {"network": "efficientnet_lite0", "target": {"top_n": 1}}
        other = client.upload_and_submit(photos / "coffee.jpg", **fields)
        assert client.wait(other).status == "succeeded"
    kept = development.settings
    assert (development.folder / "gradcam-dev" / "environment").stat().st_mode & 0o077 == 0
    assert development.stop() == 130
    end = time.monotonic() + 60
    while left := development.left():
        assert time.monotonic() < end, left
        time.sleep(0.1)
    (development.folder / "gradcam-dev" / "environment").unlink()
    development.start(until_ready=False)
    assert development.settings == kept, "what an app exports stays the same"
    with GradcamClient(settings=kept) as client:
        assert client.status(document.id) == document
    assert development.stop() == 130, "also while it starts"
