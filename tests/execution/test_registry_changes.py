"""Networks from a registry file that changes while jobs run."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible, UnknownNetwork
from gradcam_worker.execution.attempt import JobContext, JobResult
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.testing import TinyNetwork, fake_services

WAIT_S = 60
FIRST, SECOND = "1" * 64, "2" * 64


class Versioned(TinyNetwork):
    """A tiny network with the checksum of its row. It waits for its gate before it computes."""

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
class Harness:
    """A registry file, and services that read it."""

    registry: Path
    loaded: dict[str, Versioned] = field(default_factory=dict)  # by checksum
    load_count: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failure: Exception | None = None

    def write_registry(self, *checksums: str) -> None:
        """Replace the registry file, by one with one version of the network or with none."""
        tables = [
            f'model = "own.keras"\nsha256 = "{checksum}"\npreprocessing = "none"\ninput_size = [16, 16]'
            for checksum in checksums
        ]
        new_file = self.registry.with_suffix(".new")
        new_file.write_text("[networks]\n" + "".join(f"[networks.own]\n{table}" for table in tables))
        new_file.replace(self.registry)

    def load(self, row: NetworkRow) -> Versioned:
        if self.failure:
            raise self.failure
        network = Versioned(row)
        self.loaded[str(network.facts.weights_sha256)] = network
        self.load_count.release()
        return network

    def services(self) -> Services:
        image = cv2.imencode(".png", np.full((16, 16, 3), (0, 0, 255), np.uint8))[1].tobytes()
        networks = Registry(self.registry)
        return fake_services({"s3://in/a.png": image}, networks=networks, inference=ModelCache(self.load))


def run(services: Services) -> JobResult:
    job = Job.parse({"image": "s3://in/a.png", "network": "own", "target": {"top_n": 1}})
    return run_job(job, services, JobContext(Deadline(WAIT_S), lambda _: None))


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness(tmp_path / "networks.toml")
    harness.write_registry(FIRST)
    return harness


def test_a_running_job_keeps_its_version_and_the_next_job_uses_the_new_one(harness: Harness) -> None:
    services = harness.services()
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(run, services)
        assert harness.load_count.acquire(timeout=WAIT_S)
        assert harness.loaded[FIRST].entered.wait(WAIT_S)
        harness.write_registry(SECOND)
        after = pool.submit(run, services)
        assert harness.load_count.acquire(timeout=WAIT_S), "the new version loads while the old one computes"
        assert not before.done()
        harness.loaded[SECOND].gate.set()
        harness.loaded[FIRST].gate.set()
        assert before.result(WAIT_S).network.weights_sha256 == FIRST
        assert after.result(WAIT_S).network.weights_sha256 == SECOND


def test_a_running_job_finishes_although_its_network_was_removed(harness: Harness) -> None:
    services = harness.services()
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(run, services)
        assert harness.load_count.acquire(timeout=WAIT_S)
        assert harness.loaded[FIRST].entered.wait(WAIT_S)
        harness.write_registry()
        with pytest.raises(UnknownNetwork, match="'own'"):
            run(services)
        harness.loaded[FIRST].gate.set()
        assert before.result(WAIT_S).network.weights_sha256 == FIRST


def test_a_new_version_that_cannot_be_loaded_fails_its_jobs_instead_of_using_the_old_one(
    harness: Harness,
) -> None:
    services = harness.services()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, services)
        assert harness.load_count.acquire(timeout=WAIT_S)
        harness.loaded[FIRST].gate.set()
        assert first.result(WAIT_S).network.weights_sha256 == FIRST
    harness.write_registry(SECOND)
    harness.failure = NetworkIncompatible("no layer to explain")
    with pytest.raises(NetworkIncompatible, match="no layer to explain"):
        run(services)
    harness.write_registry(FIRST)
    assert run(services).network.weights_sha256 == FIRST, "the old row needs no other load"
