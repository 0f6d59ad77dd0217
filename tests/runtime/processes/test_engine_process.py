"""The engine process with a small network, without its supervisor."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradcam_worker import gradcam
from gradcam_worker.errors import InternalError, InvalidSettings
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.runtime.processes import engine_process
from gradcam_worker.settings import Settings
from gradcam_worker.testing import TinyNetwork

TIMEOUT_S = 60
# Keras is not needed: the one network is not computed by it.
BACKEND = SimpleNamespace(
    device_name=lambda: "cpu",
    peak_memory=lambda: None,
    reset_peak_memory=lambda: None,
    set_intra_op_threads=lambda _: None,
    name=lambda: "numpy",
    version=lambda: "numpy",
)


@contextmanager
def engine(
    path: Path, load: Callable[[], object], backend: object = BACKEND, *, supervised: bool = True
) -> Iterator[tuple[ForkProcess, int, Path]]:
    """An engine in a fork of this process, the end of the pipe with its signs, and what it writes.

    Args:
        path: Of its socket.
        load: Is called before each network is loaded.
        backend: What computes.
        supervised: Whether its supervisor lives.
    """
    settings = Settings(preload=("efficientnet_lite0",), engine_socket=path, role="engine")
    signs, writes = os.pipe()
    supervisor, open_end = os.pipe()  # the engine ends when its standard input does
    log = path.with_name("log")

    def load_network(row: object) -> TinyNetwork:
        load()
        return TinyNetwork()

    def run() -> None:
        os.close(open_end)
        os.dup2(supervisor, 0)
        with log.open("wb") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        logging.getLogger().handlers.clear()  # those of pytest
        sys.modules["gradcam_worker.gradcam.backend"] = gradcam.backend = backend  # type: ignore[assignment]
        sys.exit(engine_process.run(settings, writes, load=load_network))

    process = get_context("fork").Process(target=run)
    process.start()
    for number in (writes, supervisor, *([] if supervised else [open_end])):
        os.close(number)
    try:
        yield process, signs, log
    finally:
        process.kill()
        process.join()
        for number in (signs, *([open_end] if supervised else [])):
            os.close(number)


@pytest.mark.parametrize("error", [ValueError("odd"), SystemError("odd"), InvalidSettings("odd")], ids=repr)
def test_an_engine_whose_first_network_cannot_be_loaded_ends_and_has_never_worked(
    tmp_path: Path, error: Exception
) -> None:
    def load() -> None:
        raise error

    with engine(tmp_path / "engine", load) as (process, signs, log):
        process.join(TIMEOUT_S)
        said = log.read_text()
        assert process.exitcode == (os.EX_CONFIG if isinstance(error, InvalidSettings) else 1)
        assert "engine_failed" in said
        assert "odd" in said
        assert b"1" not in os.read(signs, 4096)


def test_an_engine_shows_life_while_it_loads_its_first_network_and_works_when_it_has(tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"

    def load() -> None:
        while not go_on.exists():
            time.sleep(0.01)

    with engine(tmp_path / "engine", load) as (_, signs, _log):
        assert os.read(signs, 1) == os.read(signs, 1) == b"0"
        go_on.touch()
        while os.read(signs, 1) == b"0":
            pass
        assert os.read(signs, 1) == b"1"


def test_an_engine_works_when_a_job_asks_something_of_it(tmp_path: Path) -> None:
    loading = partial(time.sleep, 3600)
    with engine(tmp_path / "engine", loading) as (_, signs, _log), ThreadPoolExecutor(1) as pool:
        assert os.read(signs, 1) == b"0"
        client = EngineClient(tmp_path / "engine", pool_bytes=1024 * 1024)
        assert client.connect(TIMEOUT_S).not_ready
        asked = pool.submit(client.load, CATALOG["vgg16"])
        while os.read(signs, 1) == b"0":
            pass
        client.close()
        assert isinstance(asked.exception(TIMEOUT_S), InternalError)


def test_an_engine_whose_device_does_not_answer_ends_with_its_supervisor(tmp_path: Path) -> None:
    backend = SimpleNamespace(**{**vars(BACKEND), "device_name": lambda: time.sleep(3600)})
    with engine(tmp_path / "engine", bool, backend, supervised=False) as (process, _, _log):
        process.join(TIMEOUT_S)
        assert process.exitcode == 1
