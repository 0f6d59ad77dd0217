"""An operator's own networks in the river: described in a real file, which changes while jobs run."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible, UnknownNetwork
from gradcam_worker.execution.pipeline import JobContext, JobResult, run_job
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.models.registry import Registry
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.testing import TinyNetwork, fake_services

WAIT_S = 60
FIRST, SECOND = "1" * 64, "2" * 64


class Versioned(TinyNetwork):
    """A tiny network that says which file it is of, and computes when it is let."""

    def __init__(self, row: NetworkRow) -> None:
        assert row.file
        self.facts = replace(TinyNetwork.facts, name=row.name, weights_sha256=row.file.sha256)
        self.entered, self.gate = threading.Event(), threading.Event()

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.entered.set()
        self.gate.wait(WAIT_S)
        return super().compute(pixels, wanted, method)


@dataclass
class House:
    """A registry file, and a worker's outside that reads it."""

    registry: Path
    loaded: dict[str, Versioned] = field(default_factory=dict)  # by checksum
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failure: Exception | None = None

    def describe(self, *checksums: str) -> None:
        """Write the file anew: one version of the network, or none."""
        tables = [
            f'model = "own.keras"\nsha256 = "{one}"\npreprocessing = "none"\ninput_size = [16, 16]'
            for one in checksums
        ]
        beside = self.registry.with_suffix(".new")
        beside.write_text("[networks]\n" + "".join(f"[networks.own]\n{table}" for table in tables))
        beside.replace(self.registry)

    def load(self, row: NetworkRow) -> Versioned:
        if self.failure:
            raise self.failure
        network = Versioned(row)
        self.loaded[str(network.facts.weights_sha256)] = network
        self.arrived.release()
        return network

    def services(self) -> Services:
        picture = cv2.imencode(".png", np.full((16, 16, 3), (0, 0, 255), np.uint8))[1].tobytes()
        networks = Registry(self.registry)
        return fake_services({"s3://in/a.png": picture}, networks=networks, model_cache=ModelCache(self.load))


def run(where: Services) -> JobResult:
    job = Job.parse({"image": "s3://in/a.png", "network": "own", "target": {"top_n": 1}})
    return run_job(job, where, JobContext(Deadline(WAIT_S), lambda _: None))


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path / "networks.toml")
    house.describe(FIRST)
    return house


def test_a_job_in_flight_ends_on_the_version_it_began_with_and_the_next_one_has_the_new(house: House) -> None:
    where = house.services()
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(run, where)
        assert house.arrived.acquire(timeout=WAIT_S)
        assert house.loaded[FIRST].entered.wait(WAIT_S)
        house.describe(SECOND)
        after = pool.submit(run, where)
        assert house.arrived.acquire(timeout=WAIT_S), "the new version loads while the old one computes"
        assert not before.done()
        house.loaded[SECOND].gate.set()
        house.loaded[FIRST].gate.set()
        assert before.result(WAIT_S).network.weights_sha256 == FIRST
        assert after.result(WAIT_S).network.weights_sha256 == SECOND


def test_a_job_in_flight_ends_though_its_network_is_removed(house: House) -> None:
    where = house.services()
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(run, where)
        assert house.arrived.acquire(timeout=WAIT_S)
        assert house.loaded[FIRST].entered.wait(WAIT_S)
        house.describe()
        with pytest.raises(UnknownNetwork, match="'own'"):
            run(where)
        house.loaded[FIRST].gate.set()
        assert before.result(WAIT_S).network.weights_sha256 == FIRST


def test_a_new_version_that_cannot_be_loaded_fails_its_jobs_and_the_old_one_answers_for_none(
    house: House,
) -> None:
    where = house.services()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, where)
        assert house.arrived.acquire(timeout=WAIT_S)
        house.loaded[FIRST].gate.set()
        assert first.result(WAIT_S).network.weights_sha256 == FIRST
    house.describe(SECOND)
    house.failure = NetworkIncompatible("no layer to explain")
    with pytest.raises(NetworkIncompatible, match="no layer to explain"):
        run(where)
    house.describe(FIRST)
    assert run(where).network.weights_sha256 == FIRST, "taking the change back takes no load"
