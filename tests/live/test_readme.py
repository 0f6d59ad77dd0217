"""Every command and every program of the README, as it stands there."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ELSEWHERE = {  # commands that a test of their own runs
    "scripts/demo": "tests/live/test_demo.py",
    "scripts/test": "what is running now",
    "scripts/bench engine --quick": "tests/test_bench.py",
    "scripts/faults images --short": "tests/faults/test_images.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    block for block in blocks("bash") if block.strip() not in ELSEWHERE and "gradcam worker" not in block
]
[WORKER] = [block for block in blocks("bash") if "gradcam worker" in block]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that looks like the clone, where the README's commands may write."""
    for name in ("scripts", "worker", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def here(stage: Any, photos: Path) -> Callable[[str], str]:
    """The README's text with this test's servers in it."""
    for key in ("cat.jpg", "cats/1.jpg", "cats/2.jpg"):
        stage.put(key, (photos / "chelsea.jpg").read_bytes())

    def substitute(text: str) -> str:
        text = text.replace("redis://127.0.0.1:6379/0", stage.settings.broker_url)
        return text.replace("http://127.0.0.1:9000", stage.settings.s3_endpoint_url)

    return substitute


def environment(stage: Any) -> dict[str, str]:
    """What an operator has set: the keys, and where the broker is."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GRADCAM_BROKER_URL": stage.settings.broker_url,
        "AWS_ACCESS_KEY_ID": stage.settings.s3_access_key_id,
        "AWS_SECRET_ACCESS_KEY": stage.settings.s3_secret_access_key.get_secret_value(),
    }


def run(command: list[str], stage: Any, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=place, env=environment(stage), capture_output=True, text=True, check=False
    )


def test_every_block_is_run_by_some_test() -> None:
    assert {block.strip() for block in blocks("bash")} >= set(ELSEWHERE)
    assert len(COMMANDS) >= 2
    assert len(blocks("python")) == 4


@pytest.mark.parametrize("block", COMMANDS)
def test_a_command_works(block: str, stage: Any, place: Path, here: Callable[[str], str]) -> None:
    done = run(["bash", "-euo", "pipefail", "-c", here(block)], stage, place)
    assert done.returncode == 0, done.stderr
    shown = {"gradcam replay": "No dead letters", "gradcam backfill": "Complete: 2 of 2 rows are explained."}
    expected = next((text for command, text in shown.items() if command in block), "Egyptian_cat")
    assert expected in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("block", blocks("python"))
def test_a_program_works(block: str, stage: Any, place: Path, here: Callable[[str], str]) -> None:
    strict = ["-W", "error::DeprecationWarning:__main__"]
    done = run([sys.executable, *strict, "-c", here(block)], stage, place)
    assert done.returncode == 0, done.stderr
    if "save" in block:
        asked = 3 if "top_n=3" in block else 1
        assert len(list((place / "explained").glob("overlay-*.jpg"))) == asked
    else:
        ended = "succeeded" if "asyncio" in block else "manifest.json Egyptian_cat"
        assert ended in done.stdout


def test_the_worker_starts_as_shown(stage: Any, place: Path, here: Callable[[str], str]) -> None:
    lines = [line for line in here(WORKER).splitlines() if not line.startswith("pip install")]
    log = place / "worker.log"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", "\n".join(lines[:-1]) + "\nexec gradcam worker"],
            cwd=place,
            env=environment(stage),
            stdout=output,
            stderr=output,
        )
        end = time.monotonic() + 60
        while "takes jobs" not in log.read_text():
            assert shell.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(60) == 0
    assert "ok   storage: wrote and read s3://results/cams/health/probe.txt" in log.read_text()


def test_what_pip_is_asked_to_install_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.findall(r"pip install '?([a-z-]+)(?:\[(\w+)\])?", README)
    assert asked
    for name, extra in asked:
        assert name == project["name"]
        assert not extra or extra in project["optional-dependencies"]


def test_the_tree_names_every_module() -> None:
    shown = set(re.findall(r"(\w+\.py)", README.partition("## The tree")[2]))
    assert shown == {path.name for path in (ROOT / "worker").glob("[!_]*.py")}


def test_the_settings_that_are_shown_exist() -> None:
    names = set(re.findall(r"GRADCAM_[A-Z0-9_]+[A-Z]", README))
    fields = (ROOT / "worker" / "settings.py").read_text()
    assert names
    for name in names:
        assert f"    {name.removeprefix('GRADCAM_').lower()}: " in fields, name
