"""How a worker starts: with TensorFlow, again where it is killed, or not at all and with a sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

COMMAND = [sys.executable, "-P", "-m", "gradcam_worker"]
WAIT_S = 120
FIELDS: dict[str, Any] = {"network": "efficientnet_lite0", "target": {"top_n": 1}}


@pytest.fixture(scope="module")
def start(make_stage: Callable[..., Any]) -> Any:
    """Servers, and nobody who works there yet."""
    return make_stage("start")


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def pid_of(document: StatusDocument) -> int:
    """Of the process that runs a job."""
    assert document.worker
    return int(document.worker.id.rpartition(":")[2])


def said_by(settings: Settings, programs: Path, *arguments: str) -> str:
    """What a command prints that ends well."""
    environment = os.environ | settings.to_environment()
    done = subprocess.run(
        [programs / "gradcam", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    return done.stdout


def test_a_worker_takes_jobs_and_is_seen_by_whoever_looks(stage: Any, warm_tensorflow: Path) -> None:
    job_id = stage.client.submit(image="s3://photos/chelsea.jpg", **FIELDS)
    document = stage.client.wait(job_id, WAIT_S)
    assert document.status == "succeeded"
    wait_for(stage.client.workers)
    look, shown = (
        json.loads(said_by(stage.settings, warm_tensorflow, "top", "--json")),
        said_by(stage.settings, warm_tensorflow, "top", "--once"),
    )
    assert look["ended"]["succeeded"] >= 1
    (worker,) = look["workers"]
    assert (worker["id"], worker["device"], worker["trouble"]) == (document.worker.id, "cpu", None)
    assert worker["batch"] >= 1
    assert worker["id"] in shown
    files = Path(f"/proc/{pid_of(document)}/maps").read_text()
    assert "/tensorflow/" in files
    unused = ("/jaxlib/", "/scipy/", "/sklearn/")  # pandas may be there for PyArrow, after a shard
    assert not [name for name in unused if name in files], "what TensorFlow imports where it is installed"


def test_a_killed_workers_job_is_run_again_by_the_next(
    stage: Any, public_server: Any, answer: Any, photos: Path
) -> None:
    asked, opened = threading.Event(), threading.Event()

    def hold() -> None:
        asked.set()
        opened.wait(WAIT_S)

    photo = (photos / "coffee.jpg").read_bytes()
    job_id = stage.client.submit(
        image=public_server.url("/start/held", answer(200, photo, before=hold)), **FIELDS
    )
    assert asked.wait(WAIT_S), "no worker took the job"
    os.kill(pid_of(stage.client.status(job_id)), signal.SIGKILL)
    opened.set()
    document = stage.client.wait(job_id, WAIT_S)
    assert (document.status, document.attempt) == ("succeeded", 2)
    assert "exit_code=-9 " in stage.log("worker")
    assert stage.store.get(f"{job_id}/overlay-1-967-espresso.jpg")


def test_a_wrong_setting_stops_a_worker_at_once_with_one_sentence_and_its_name(
    start: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.keras").write_text("no network")
    table = f'[networks.own]\nmodel = "text.keras"\nsha256 = "{file_sha256(tmp_path / "text.keras")}"\n'
    (tmp_path / "networks.toml").write_text(table + 'preprocessing = "unit"\ninput_size = [32, 32]\n')
    wrong: dict[str, dict[str, Any]] = {
        "GRADCAM_OUTPUT: .*NoSuchBucket": {"output": "s3://nowhere/cams"},
        "GRADCAM_S3_ACCESS_KEY_ID": {"s3_access_key_id": "nobody"},
        "GRADCAM_PRELOAD: There is no network 'vgg61'": {"preload": ("vgg61",)},
        "GRADCAM_NETWORKS: .*none.toml": {"networks": tmp_path / "none.toml"},
        "GRADCAM_DEVICES or --devices asks for GPU 99": {"devices": "99"},
        "GRADCAM_BROKER_URL: .*Invalid Database|out of range": {
            "broker_url": start.settings.broker_url.removesuffix("/0") + "/77"
        },
        # This is known only where the network is loaded: by the process that the supervisor has started.
        "GRADCAM_PRELOAD: .*cannot be loaded as own": {
            "networks": tmp_path / "networks.toml",
            "cache_dir": tmp_path / "cache",
            "preload": ("own",),
        },
    }
    begun = {
        sentence: subprocess.Popen(
            [*COMMAND, "worker"],
            env=os.environ | start.settings.model_copy(update=changes).to_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for sentence, changes in wrong.items()
    }
    for sentence, program in begun.items():
        with program:
            said = program.communicate(timeout=WAIT_S)[0]
        lines = [line for line in said.splitlines() if " INFO " not in line]
        assert program.returncode == 1, said
        assert len(lines) == 1, said
        assert re.search(sentence, lines[0])
        assert "again in" not in said, "nothing that can only fail is tried again"
