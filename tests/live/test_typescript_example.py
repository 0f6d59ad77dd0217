"""The TypeScript example by the lines of its page: a client made from the OpenAPI document, under Node."""

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import uvicorn

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.gateway.access.caller import Access
from gradcam_worker.gateway.app import create_app
from gradcam_worker.operations import servers
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.settings import Settings
from gradcam_worker.testing import eager_client

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "typescript"
LESSON = ROOT / "docs" / "tutorial" / "web-app.md"
RED = cv2.imencode(".png", np.full((32, 32, 3), (0, 0, 255), np.uint8))[1].tobytes()
TIMEOUT_S = 60


@pytest.fixture
def api(settings: Settings) -> Iterator[str]:
    """The address of an API whose jobs run in memory as they are submitted."""
    port = servers.free_port()
    client = AsyncGradcamClient(client=eager_client({"s3://photos/cat.jpg": RED}))
    settings = settings.changed(uploads="s3://photos")
    access = Access(settings, RedisServer(settings), loopback=True)
    app = create_app(settings, client=client, access=access)
    config = uvicorn.Config(app, port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + TIMEOUT_S
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(TIMEOUT_S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the example, where npm may write."""
    if not shutil.which("npm"):
        missing = "npm is not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    names = ("package.json", "package-lock.json", "tsconfig.json", "explain.ts")
    for name in names:
        shutil.copy(EXAMPLE / name, tmp_path / name)
    return tmp_path


def run(command: str, folder: Path, api: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "GRADCAM_API": api, "npm_config_audit": "false", "npm_config_fund": "false"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_client_is_made_from_the_document_and_explains_an_image(folder: Path, api: str) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", LESSON.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "npm ci" in block]
    first, *lines = block.splitlines()
    assert first == "cd docs/examples/typescript"
    done = run("\n".join(lines), folder, api)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^red \d\.\d{3}\n\w+ \d\.\d{3}\nred data\n\w+ data\n\Z", done.stdout, re.MULTILINE)

    (folder / "mine.txt").write_text("no image")
    refused = run("npm start -- mine.txt", folder, api)
    assert refused.returncode == 1
    assert "unsupported_media_type: " in refused.stderr, "a problem is typed, too"


def test_the_example_names_no_registry_and_no_made_file() -> None:
    lock = (EXAMPLE / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    listed = subprocess.check_output(["git", "ls-files", str(EXAMPLE)], cwd=ROOT, text=True).splitlines()
    assert {Path(name).name for name in listed} <= {
        "package.json",
        "package-lock.json",
        "tsconfig.json",
        "explain.ts",
    }
