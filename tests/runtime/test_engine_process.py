"""The engine process with a small network, without its supervisor."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from gradcam_worker.errors import InternalError
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.settings import Settings

TIMEOUT_S = 60
PROGRAM = """
import pathlib, sys, time
from types import SimpleNamespace
import gradcam_worker.gradcam
no_keras = SimpleNamespace(
    device_name=lambda: "cpu", peak_memory=lambda: None, reset_peak_memory=lambda: None,
    set_intra_op_threads=lambda _: None, name=lambda: "numpy", version=lambda: "numpy",
)
sys.modules["gradcam_worker.gradcam.backend"] = gradcam_worker.gradcam.backend = no_keras
from gradcam_worker.runtime import engine_process
from gradcam_worker.settings import Settings
from gradcam_worker.testing import TinyNetwork
def load(row):
    {load}
    return TinyNetwork()
sys.exit(engine_process.run(Settings.from_environment(), int(sys.argv[1]), load=load))
"""


@contextmanager
def engine(path: Path, load: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An engine process whose networks are loaded in this way, and the end of the pipe with its signs."""
    settings = Settings(preload=("efficientnet_lite0",), engine_socket=path, role="engine")
    signs, writes = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(load=load), str(writes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[writes],
        env=settings.environment_for_child(),
        text=True,
    )
    os.close(writes)
    try:
        yield process, signs
    finally:
        process.kill()
        process.communicate()  # which closes its standard input: it ends when its supervisor has
        os.close(signs)


@pytest.mark.parametrize("error", ["ValueError('odd')", "SystemError('odd')", "InvalidSettings('odd')"])
def test_an_engine_whose_first_network_cannot_be_loaded_ends_and_has_never_worked(
    tmp_path: Path, error: str
) -> None:
    load = f"from gradcam_worker.errors import InvalidSettings; raise {error}"
    with engine(tmp_path / "engine", load) as (process, signs):
        code, said = process.wait(TIMEOUT_S), process.stdout.read() if process.stdout else ""
        assert code == (os.EX_CONFIG if "Settings" in error else 1)
        assert "engine_failed" in said
        assert "odd" in said
        assert b"1" not in os.read(signs, 4096)


def test_an_engine_shows_life_while_it_loads_its_first_network_and_works_when_it_has(tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    wait = f"while not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.01)"
    with engine(tmp_path / "engine", wait) as (_, signs):
        assert os.read(signs, 1) == os.read(signs, 1) == b"0"
        go_on.touch()
        while os.read(signs, 1) == b"0":
            pass
        assert os.read(signs, 1) == b"1"


def test_an_engine_works_when_a_job_asks_something_of_it(tmp_path: Path) -> None:
    with engine(tmp_path / "engine", "time.sleep(3600)") as (_, signs), ThreadPoolExecutor(1) as pool:
        assert os.read(signs, 1) == b"0"
        client = EngineClient(tmp_path / "engine", pool_bytes=1024 * 1024)
        assert client.connect(TIMEOUT_S).not_ready
        asked = pool.submit(client.load, CATALOG["vgg16"])
        while os.read(signs, 1) == b"0":
            pass
        client.close()
        assert isinstance(asked.exception(TIMEOUT_S), InternalError)
