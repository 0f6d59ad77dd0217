"""Every command and every program of README, CONTRIBUTING and docs/ is run as it is written.

A page is one shell session: its `bash` blocks share variables, its `python` blocks are programs that run in
between; one that imports nothing continues the one before. A `text` block after one of them is what it
prints; `...` stands for anything. A command that is not run stands in NOT_RUN, a page that another test runs
in ELSEWHERE. Each command is a process, which on most pages is forked from one that has TensorFlow: see COLD.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
WRITTEN = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "deploy/README.md", "docker/README.md"))]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *WRITTEN]
WORKER_PAGE = ROOT / "docs" / "how-to" / "run-a-worker.md"
ELSEWHERE = {
    "docs/how-to/compare.md": "tests/docs/test_compare.py",
    "docs/how-to/audit-page.md": "tests/live/test_audit_page.py",
    "docs/how-to/http-api.md": "tests/live/test_gateway.py",
    "docs/how-to/ray-dask-spark.md": "tests/docs/test_clusters.py",
    "docs/how-to/other-languages.md": "tests/live/test_queue_doc.py",
    "docs/reference/dataset.md": "tests/docs/test_dataset.py",
}
NOT_RUN = {  # how a command begins -> why it is not run here
    r"docker/secrets": "tests/deploy/test_docker.py runs it",
    r"docker ": "needs Docker; scripts/check-deploy checks what it uses",
    r"gradcam deliver": "runs until it is stopped: tests/live/test_delivery.py",
    r"gradcam doctor --sample ": "needs a trained network: tests/operations/test_sample_check.py",
    r"gradcam doctor": "test_the_worker_starts_as_shown runs it once",
    r"gradcam networks fetch": "downloads weights: tests/cli/test_operate.py",
    r"gradcam worker": "runs until it is stopped: test_the_worker_starts_as_shown",
    r"helm |kubectl ": "needs a cluster; scripts/check-deploy checks the chart",
    r"(cd docs/examples/typescript|npm )": "tests/live/test_typescript_example.py",
    r"gradcam serve": "runs until it is stopped: tests/live/test_gateway.py",
    r"(scripts/dev|gradcam dev) ": "runs until it is stopped: tests/live/test_dev.py",
    r"(uvicorn --app-dir|python) docs/examples": "tests/live/test_dev.py starts the examples",
    r"(python3 -m venv|venv/bin/pip|pip) ": "tests/live/test_install.py installs the wheel",
    r"pytest |scripts/(setup|test)": "what is running now",
    r"scripts/bench ": "measures: tests/devtools/test_bench.py",
    r"scripts/demo": "tests/live/test_demo.py",
    r"scripts/docs": "tests/docs/test_site.py",
    r"scripts/faults ": "attacks for minutes: tests/faults",
    r"valkey-cli ": "asks for the password of an administrator",
}
COLD = {"README.md", "docs/how-to/run-a-worker.md", "docs/tutorial/web-app.md"}  # here each starts anew
RUN = ("bash", "python")
SHOWN = {
    "go",
    "html",
    "java",
    "javascript",
    "json",
    "sql",
    "text",
    "toml",
    "yaml",
}  # languages of blocks that are no commands
MARK = "-- block {} --"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    printed: str | None  # the text block that follows it directly

    @property
    def command(self) -> str:
        """What of it is run."""
        if self.language != "bash":
            return self.text
        lines = re.findall(r"(?:.*\\\n)*.*\n", self.text)
        return "".join(line for line in lines if not left_out(line))


def left_out(line: str) -> str | None:
    """How a line begins that is not run."""
    return next((start for start in NOT_RUN if re.match(start, line + " ")), None)


def blocks(page: Path) -> list[Block]:
    fences = r"^```(\w*)\n(.*?)^```\n?(?:\n```text\n(.*?)^```)?"
    found = re.findall(fences, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text, printed or None) for language, text, printed in found]


def programs(given: list[Block]) -> Iterator[Block]:
    """The blocks, where a Python block that imports nothing is put behind the one that it continues."""
    waiting: Block | None = None
    for block in given:
        continues = block.language == "python" and not re.search("^(import|from) ", block.text, re.MULTILINE)
        if continues and waiting:
            waiting = Block("python", waiting.text + block.text, block.printed)
            continue
        if waiting:
            yield waiting
        waiting = block if block.language == "python" else None
        if waiting is None:
            yield block
    if waiting:
        yield waiting


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that this module runs; those of the README that docs/ has too, only there."""
    others = () if page != README else (other for other in PAGES if other not in WRITTEN)
    known = {block.text for other in others for block in blocks(other)}
    return [
        block
        for block in programs(blocks(page))
        if block.language in RUN
        and block.command.strip(" \n")
        and name_of(page) not in ELSEWHERE
        and block.text not in known
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


SESSIONS = [page for page in PAGES if runnable(page)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that looks like the clone, where commands may write, and where `gradcam dev` has run."""
    (tmp_path / "gradcam-dev").mkdir()
    (tmp_path / "gradcam-dev" / "environment").write_text("export GRADCAM_OUTPUT=s3://results/cams\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("deploy", "scripts", "worker"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def here(stage: Any, photos: Path) -> Callable[[str], str]:
    """Puts this test's servers into a text."""
    for key in ("cat.jpg", "cats/1.jpg", "cats/2.jpg"):
        stage.put(key, (photos / "chelsea.jpg").read_bytes())

    def substitute(text: str) -> str:
        text = text.replace("redis://127.0.0.1:6379/0", stage.settings.broker_url)
        return text.replace("http://127.0.0.1:9000", stage.settings.s3_endpoint_url)

    return substitute


def environment(stage: Any, programs: Path = Path(sys.executable).parent) -> dict[str, str]:
    """What an operator has set: the keys, and where programs, broker and S3 are."""
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "GRADCAM_BROKER_URL": stage.settings.broker_url,
        "GRADCAM_S3_ENDPOINT_URL": stage.settings.s3_endpoint_url,
        "GRADCAM_FORWARD": stage.settings.forward,
        "GRADCAM_MAX_BATCH": str(stage.settings.max_batch),
        "AWS_ACCESS_KEY_ID": stage.settings.s3_access_key_id,
        "AWS_SECRET_ACCESS_KEY": stage.settings.s3_secret_access_key.get_secret_value(),
    }


@pytest.mark.parametrize("page", SESSIONS, ids=name_of)
def test_the_commands_and_programs_of_a_page_work(
    page: Path, stage: Any, place: Path, here: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    session = runnable(page)
    if name_of(page) in COLD:
        programs = Path(sys.executable).parent
    else:
        programs = request.getfixturevalue("warm_tensorflow")
    (place / ".venv" / "bin" / "activate").write_text(f"PATH={programs}:$PATH\n")
    script = ["set -euo pipefail"]
    for number, block in enumerate(session):
        script.append(f"echo '{MARK.format(number)}'")
        if block.language == "python":
            (place / f"block{number}.py").write_text(here(block.text))
            script.append(f"python -W error::DeprecationWarning:__main__ block{number}.py")
        else:
            script.append(here(block.command))
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=place,
        env=environment(stage, programs),
        capture_output=True,
        text=True,
        check=False,
    )
    printed = re.split(r"^-- block \d+ --\n", done.stdout, flags=re.MULTILINE)[1:]
    assert done.returncode == 0, f"{session[len(printed) - 1].text}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    for block, said in zip(session, printed, strict=True):
        if block.printed is not None:
            expected = re.escape(block.printed.strip()).replace(r"\.\.\.", ".*")
            assert re.fullmatch(expected, said.strip(), re.DOTALL), f"{block.text}printed:\n{said}"


def test_the_worker_starts_as_shown(stage: Any, place: Path, here: Callable[[str], str]) -> None:
    [block] = [one for one in blocks(WORKER_PAGE) if "gradcam worker" in one.text]
    lines = here(block.text).splitlines()
    log = place / "worker.log"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", "\n".join(lines[:-1]) + "\nexec gradcam worker"],
            cwd=place,
            env=environment(stage),
            stdout=output,
            stderr=output,
        )
        end = time.monotonic() + 120
        while "worker_started" not in log.read_text():
            assert shell.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(60) == 0
    assert "ok   storage: wrote and read s3://results/cams/health/probe.txt" in log.read_text()


def test_each_block_has_a_language_and_what_is_not_run_is_there() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {*RUN, *SHOWN}
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash"
        for line in block.text.splitlines()
    ]
    assert {left_out(line) for line in lines} - {None} == NOT_RUN.keys(), "some reason is not needed any more"
    assert {name_of(page) for page in PAGES} >= ELSEWHERE.keys()
    assert len(SESSIONS) > 10


def test_json_on_a_page_is_json() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "json":
                json.loads(block.text)
