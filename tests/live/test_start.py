"""How a worker starts: soon, or not at all and with a sentence."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

COMMAND = [sys.executable, "-P", "-m", "gradcam_worker"]
WAIT_S = 120


@pytest.fixture(scope="module")
def start(make_stage: Callable[..., Any]) -> Any:
    """Servers, and nobody who works there yet."""
    return make_stage("start")


def said_by(settings: Settings, *arguments: str) -> str:
    """What a command prints that ends well."""
    environment = os.environ | settings.to_environment()
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=True, timeout=WAIT_S
    )
    return done.stdout


def test_a_worker_soon_takes_jobs_and_is_seen_by_whoever_looks(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_s = time.monotonic()
    with start.worker("first"):
        while "worker_started" not in start.log("first"):
            assert time.monotonic() < begun_s + WAIT_S, start.log("first")
            time.sleep(0.02)
        ready_s = time.monotonic() - begun_s
        with capsys.disabled():
            print(f"\n{ready_s:.1f} s from exec to taking jobs, efficientnet_lite0 on a CPU")  # noqa: T201
        job_id = start.client.submit(
            image="s3://photos/chelsea.jpg", network="efficientnet_lite0", target={"top_n": 1}
        )
        assert start.client.wait(job_id, WAIT_S).status == "succeeded"
        while not (look := json.loads(said_by(start.settings, "top", "--json")))["workers"]:
            assert time.monotonic() < begun_s + WAIT_S, "it says what it does as often as it renews leases"
        shown = said_by(start.settings, "top", "--once")
    assert look["ended"]["succeeded"] == 1
    (worker,) = look["workers"]
    assert (worker["device"], worker["trouble"]) == ("cpu", None)
    assert worker["batch"] >= 1
    assert worker["id"] in shown


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
