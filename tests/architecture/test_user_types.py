"""The public names as a user's type checker sees them: its own settings, and no plugin of pydantic."""

import asyncio
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest

from gradcam_worker import AsyncGradcamClient, gradcam
from gradcam_worker.client.job_fields import JobOptions
from gradcam_worker.schemas.job import ImageRef, Job, JobDetails, JobFields, Target, Webhook
from gradcam_worker.schemas.options import ArtifactKind, ArtifactSpec
from gradcam_worker.testing import TinyNetwork, eager_client

USER_CODE = Path(__file__).with_name("user_code.py")
RED = np.full((32, 32, 3), (255, 0, 0), np.uint8)
PNG = cv2.imencode(".png", RED[..., ::-1])[1].tobytes()
WRONG = """\
import asyncio
from gradcam_worker import AsyncGradcamClient, GradcamClient, Job
from gradcam_worker.gradcam import explain_image, load_network
from gradcam_worker.schemas.job import Target
client = GradcamClient()
target = Target(top_n=1)
Job(image=5, network="vgg16", target=target)  # wrong
Job(image="s3://in/a.jpg", network="vgg16")  # wrong
Job(image="s3://in/a.jpg", network="vgg16", target=target, priority="urgent")  # wrong
Target(top_n="3")  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", target=target, top_m=1)  # wrong
client.submit(network="vgg16", target=target)  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16")  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", top_m=3)  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", top_n="3")  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", top_n=3, classes=["tabby"])  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", top_n=3, method="gradcam+")  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", top_n=3, artifacts=["overly"])  # wrong
client.submit(image="s3://in/a.jpg", network="vgg16", top_n=3).wate()  # wrong
client.upload_and_submit("a.jpg", network="vgg16")  # wrong
client.upload_and_submit("a.jpg", network="vgg16", top_n=3, priorty="high")  # wrong
client.wait(5)  # wrong
asyncio.run(AsyncGradcamClient().submit(network="vgg16"))  # wrong
asyncio.run(AsyncGradcamClient().submit(image="s3://in/a.jpg", network="vgg16", top_n=3, metdata={}))  # wrong
client.result("id").urls.first()  # wrong
client.result("id").overlays[0].link  # wrong
client.list(state="failed")  # wrong
client.list(status="failing")  # wrong
client.webhooks.unwrap(b"", {})  # wrong
explain_image(load_network("vgg16"), 5, top_n=1)  # wrong
explain_image(load_network("vgg16"), "a.jpg", top=1)  # wrong
"""


# What no public type has anything of: mypy need not read it, and takes half as long.
NOT_PUBLIC = ["PIL", "anyio", "click", "cv2", "httpcore", "httpx", "obstore", "opentelemetry", "pytest"]
NOT_PUBLIC += ["_pytest", "rich", "trio", "urllib3"]


def marked_lines() -> set[tuple[str, int]]:
    return {("wrong.py", number) for number, line in enumerate(WRONG.splitlines(), 1) if "# wrong" in line}


@pytest.mark.server
def test_what_a_user_writes_is_right_to_mypy_and_what_he_writes_wrong_is_told(tmp_path: Path) -> None:
    wrong, config = tmp_path / "wrong.py", tmp_path / "config.ini"
    wrong.write_text(WRONG)
    skipped = ",".join(f"{name}.*" for name in NOT_PUBLIC)
    config.write_text(f"[mypy]\nstrict = true\n[mypy-{skipped}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", os.devnull]
    done = subprocess.run(
        [*command, str(USER_CODE), str(wrong)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"(\w+\.py):(\d+)(?::\d+)?: error", done.stdout)
    assert {(name, int(number)) for name, number in found} == marked_lines()


class Editor:
    """A language server, asked as an editor asks it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self._to, self._from = process.stdin, process.stdout

    def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._to.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self._to.flush()

    def ask(self, method: str, **params: Any) -> Any:
        self.send(id=method, method=method, params=params)
        while True:
            message = self._receive()
            if message.get("id") == method and "method" not in message:
                return message["result"]

    def errors(self, path: Path) -> set[tuple[str, int]]:
        """The name of a file, and the lines at which the server finds errors."""
        text = {"uri": path.as_uri(), "languageId": "python", "version": 1, "text": path.read_text()}
        self.send(method="textDocument/didOpen", params={"textDocument": text})
        while True:
            message = self._receive()
            if message.get("method") == "textDocument/publishDiagnostics":
                told = message["params"]
                if told["uri"] == path.as_uri():
                    lines = [
                        one["range"]["start"]["line"] for one in told["diagnostics"] if one["severity"] == 1
                    ]
                    return {(path.name, line + 1) for line in lines}

    def _receive(self) -> dict[str, Any]:
        size = 0
        while line := self._from.readline().strip():
            name, _, value = line.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        message: dict[str, Any] = json.loads(self._from.read(size))
        if "method" in message and "id" in message:  # it asks for settings: there are none
            self.send(id=message["id"], result=None)
        return message


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Editor, Path]]:
    """basedpyright at its strictest, as an editor starts it, and the folder that it is for."""
    folder = tmp_path_factory.mktemp("project")
    config = {"pythonVersion": "3.11", "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("basedpyright-langserver")), "--stdio"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        editor = Editor(process)
        editor.ask("initialize", processId=None, rootUri=folder.as_uri(), capabilities={})
        editor.send(method="initialized", params={})
        yield editor, folder
        process.terminate()


@pytest.mark.server
def test_what_a_user_writes_is_right_to_pyright_and_what_he_writes_wrong_is_told(
    editor: tuple[Editor, Path],
) -> None:
    server, folder = editor
    wrong = folder / "wrong.py"
    wrong.write_text(WRONG)
    assert server.errors(wrong) == marked_lines()
    assert not server.errors(Path(shutil.copy(USER_CODE, folder)))


@pytest.mark.server
def test_an_editor_completes_the_fields_of_a_job(editor: tuple[Editor, Path]) -> None:
    text = "from gradcam_worker import {0}\n{0}().submit()\n"
    server, folder = editor
    offered = []
    for name in ("GradcamClient", "AsyncGradcamClient"):
        document = {"uri": (folder / f"{name}.py").as_uri(), "languageId": "python", "version": 1}
        given = {**document, "text": text.format(name)}
        server.send(method="textDocument/didOpen", params={"textDocument": given})
        place = {"line": 1, "character": len(f"{name}().submit(")}
        answer = server.ask("textDocument/completion", textDocument=document, position=place)
        offered.append({one["label"] for one in answer["items"]})
    fields = {*JobOptions.__annotations__, "image", "network", "top_n", "classes", "against", "target"}
    for labels in offered:
        assert {label for label in labels if label.endswith("=")} == {
            f"{name}=" for name in fields | {"retry_failed"}
        }


def test_what_a_user_writes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_network", "wrap_model"):  # which import TensorFlow, and are not called
        monkeypatch.setitem(vars(gradcam), name, None)
    image = tmp_path / "red.png"
    image.write_bytes(PNG)
    code = runpy.run_path(str(USER_CODE))
    client = eager_client({"s3://in/red.png": PNG})
    said = code["with_client"](client, image)
    assert said[:4] == ["succeeded", "succeeded", "red", "green"]
    assert set(said[-8:]) == {"succeeded"}
    assert code["webhook"](client, b"{}", {}) == "invalid_webhook"
    said = asyncio.run(code["with_async_client"](AsyncGradcamClient(client=client)))
    assert said[:2] == ["succeeded", "succeeded"]
    assert said[-1] == "failed", "its bytes are no image"
    accepted, why = code["refused"](client)
    assert (client.status(accepted).status, why) == ("succeeded", "invalid_job")
    said = code["explained"](TinyNetwork(), image, RED)
    assert said[:5] == ["red", "green", "blue", "red", "green"]
    assert said[5:] == ["unsupported_media_type", "overlay-1-0-red.jpg", "2"]


def test_what_type_checkers_are_told_of_a_job_is_what_a_job_has() -> None:
    fields = {field.alias or name: field for name, field in Job.model_fields.items()}
    assert JobFields.__annotations__.keys() == fields.keys()
    assert JobFields.__required_keys__ == {name for name, field in fields.items() if field.is_required()}
    assert JobDetails.__annotations__.keys() == fields.keys() - {"image"}


def test_what_type_checkers_are_told_of_submit_is_a_job_and_its_short_forms() -> None:
    fields = {field.alias or name for name, field in Job.model_fields.items()}
    assert JobOptions.__annotations__.keys() == fields - {"image", "network", "target"} | {"webhook"}
    assert {*get_args(ArtifactKind)} == {
        get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(ArtifactSpec)[0])
    }


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (Target, {"top_n", "classes", "against"}),
        (Webhook, {"url", "events", "secret_ref"}),
        (ImageRef, {"uri", "sha256", "redirects"}),
    ],
)
def test_what_type_checkers_are_told_of_its_parts_is_what_these_have(model: Any, fields: set[str]) -> None:
    assert model.model_fields.keys() == fields
