"""A real worker's metrics and health, through good days and bad ones; and deliveries without any worker."""

import base64
import contextlib
import http.client
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from devtools import import_path, processes
from devtools.faults import tiny_network, tiny_worker
from devtools.faults.engine import of_role
from gradcam_worker import __version__
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.broker import publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability.definitions import DURATION_BUCKETS, METRICS
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live]

WAIT_S = 60
ODD = Path(__file__).parent / "odd_worker.py"


def picture(color: tuple[int, int, int]) -> str:
    """A data URI of nothing but one colour (RGB)."""
    data = cv2.imencode(".png", np.full((32, 32, 3), color[::-1], np.uint8))[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


@dataclass
class Plant:
    """A broker, and a process that serves its metrics."""

    settings: Settings
    valkey: servers.Server
    folder: Path

    def __post_init__(self) -> None:
        self.ledger, self.client = RedisLedger(self.settings), GradcamClient(settings=self.settings)

    @contextlib.contextmanager
    def running(self, name: str, command: list[str]) -> Iterator[Any]:
        process = parent_watch.spawn(
            command,
            log=self.folder / f"{name}.log",
            environment={
                **self.settings.to_environment(),
                "ODD_FOLDER": str(self.folder),
                **import_path(),
            },
        )
        try:
            yield process
        finally:
            parent_watch.stop(process)

    def ask(self, path: str) -> tuple[int, str]:
        """Status and body; 0 while nobody listens."""
        url = f"http://127.0.0.1:{self.settings.metrics_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except http.client.IncompleteRead:  # a busy machine: a call that takes 5 s is cut off
            return self.ask(path)
        except OSError:
            return 0, ""

    def why(self, path: str) -> Any:
        return json.loads(self.ask(path)[1])["why"]

    def metrics(self) -> dict[str, float]:
        """`name{label=value,...}` -> value."""
        found = {}
        for family in text_string_to_metric_families(self.ask("/metrics")[1]):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if value)
                found[sample.name.removeprefix("gradcam_") + (f"{{{labels}}}" if labels else "")] = (
                    sample.value
                )
        return found

    def submit(self, color: tuple[int, int, int], **fields: Any) -> str:
        asked = {"network": tiny_network.NETWORK, "target": {"top_n": 1}, **fields}
        return self.client.submit(image=picture(color), **asked)


@pytest.fixture
def plant(tmp_path: Path, free_port: int, http_server: Any) -> Iterator[Plant]:
    with servers.valkey(tmp_path) as server:
        settings = Settings(
            broker_url=f"redis://127.0.0.1:{server.port}/0",
            output=f"file://{tmp_path}/results",
            image_schemes=("data",),
            webhook_hosts=(http_server.host,),
            private_networks=("127.0.0.0/8",),
            lease_s=1,
            lost_after_s=1,
            retry_backoff_s=0.1,
            devices="cpu",
            threads=3,
            max_batch=4,
            preload=(tiny_network.NETWORK,),
            shutdown_timeout_s=1,
            metrics_port=free_port,
        )
        yield Plant(settings, server, tmp_path)


def shard(plant: Plant) -> str:
    backfill, output = new_id(), plant.settings.output
    registry = RedisBackfillRegistry(plant.ledger.server)
    made = Shard(
        backfill=backfill,
        token=registry.renew(output, "me", {"backfill": backfill}, [], "a token", enter=True).token,
        index=0,
        key="00000000-0123456789abcdef",
        first=0,
        rows=[{"uri": picture((9, 200, 9))}, {"uri": "data:image/png;base64,!"}],  # type: ignore[arg-type]
        network=tiny_network.NETWORK,
        target={"top_n": 1},  # type: ignore[arg-type]
        output=output,
    )
    plant.ledger.submit(made)
    publisher.Publisher(plant.settings).republish([made.id], "shard")
    return made.id


def test_a_worker_shows_every_metric_and_whether_it_is_well(
    plant: Plant, http_server: Any, answer: Any
) -> None:
    told = http_server.url("/told", answer(204))
    with plant.running("worker", tiny_worker.command(ODD)):
        wait_for(lambda: plant.ask("/ready")[0] == 200, "readiness")
        assert [plant.ask(path)[0] for path in ("/live", "/startup")] == [200, 200]
        hooks = [{"url": told, "events": ["job.succeeded"]}]
        ids = [plant.submit((20 * number, 80, 90), webhooks=hooks) for number in range(5)]
        ids += [plant.submit((9, 9, 9), target={"classes": ["no such class"]}), shard(plant)]
        for one in ids:
            plant.client.wait(one, WAIT_S)
        wait_for(lambda: plant.metrics()["events_delivered_total{outcome=delivered}"] == 5, "the deliveries")
        wait_for(lambda: plant.metrics()["shard_rows_total{outcome=failed}"] == 1, "the shard's end")
        found = plant.metrics()

        shown = {name.partition("{")[0] for name in found}
        for each in (
            METRICS
        ):  # the device's are absent without a GPU: tests/observability/test_prometheus.py has them
            name = f"{each.name}_bucket" if each.kind == "histogram" else each.name
            never = each.source == "device" or "tenant" in each.labels  # no tenant has submitted anything
            assert (name in shown) == (not never and "worker" in each.roles), name
        assert found["jobs_total{state=succeeded}"] == 6, "the shard, too"
        assert found["jobs_total{code=unknown_class,state=failed}"] == 1
        assert found["job_attempts_total{outcome=done}"] == 7
        assert found["shard_rows_total{outcome=explained}"] == 1
        assert found["image_bytes_total"] > 6 * 80
        assert found["artifact_bytes_total"] > 1000
        assert found["job_stage_seconds_count{stage=upload}"] == 5
        assert 0 < found["job_stage_seconds_sum{stage=fetch}"] < DURATION_BUCKETS[-1]
        assert found["batch_images_sum"] >= 5 + 4, "a shard's pass is padded"
        assert found["batch_images_count"] == found["batch_seconds_count"] > 1
        assert (
            found["network_loads_total{outcome=loaded}"] == found["networks_resident"] == found["ready"] == 1
        )
        assert found["worker_starts_total"] == found[f"build_info{{version={__version__}}}"] == 1
        assert not found["jobs_in_flight"] + found["shards_in_flight"] + found["breaker_open"]
        assert found["process_resident_memory_bytes"] > 1e7

        plant.submit(tiny_network.POISON, max_attempts=2)  # and the process that takes it ends
        wait_for(lambda: plant.metrics().get("worker_starts_total", 0) >= 2, "another start")
        wait_for(lambda: plant.metrics().get("dead_jobs") == 2, "the end of what kills")  # cached for 5 s
        wait_for(lambda: plant.ask("/ready")[0] == 200, "readiness after a restart")

        server = processes.family(plant.valkey.process.pid)
        try:
            send(server, signal.SIGSTOP)  # a broker that is there and says nothing
            wait_for(lambda: plant.ask("/ready")[0] == 503, "that the broker is missed")
            assert {"broker", "ledger"} <= plant.why("/ready").keys()
            end = time.monotonic() + 6  # longer than a loop may stand still: see odd_worker
            while time.monotonic() < end:
                assert plant.ask("/live")[0] == 200, plant.why("/live")
                time.sleep(0.2)
            assert plant.ask("/startup")[0] == 200
            assert "queue_jobs{priority=high}" not in plant.metrics(), "absent, not zero"
        finally:
            send(server, signal.SIGCONT)
        wait_for(lambda: plant.ask("/ready")[0] == 200, "that the broker is found again")


def test_one_port_shows_engine_and_job_processes_and_whether_they_are_well(plant: Plant) -> None:
    plant = replace(plant, settings=plant.settings.model_copy(update={"job_processes": 2}))
    members = ("engine-0", "jobs-0-1", "jobs-0-2")
    with plant.running("worker", tiny_worker.command()) as process:
        wait_for(lambda: plant.ask("/ready")[0] == 200, "readiness")
        assert [plant.ask(path)[0] for path in ("/live", "/startup")] == [200, 200]
        for one in [plant.submit((20 * number, 80, 90)) for number in range(6)]:
            plant.client.wait(one, WAIT_S)
        wait_for(lambda: plant.metrics().get("process_up{process=jobs-0-2}") == 1, "the second job process")
        succeeded = [f"jobs_total{{process={name},state=succeeded}}" for name in members[1:]]
        wait_for(lambda: sum(map(plant.metrics().__getitem__, succeeded)) == 6, "that all jobs are counted")
        wait_for(lambda: plant.metrics().get("workers_alive") == 2, "the ledger's gauges")  # cached for 5 s
        found = plant.metrics()
        assert [found[f"process_up{{process={name}}}"] for name in members] == [1, 1, 1]
        assert [found[f"worker_starts_total{{process={name}}}"] for name in members] == [1, 1, 1]
        assert found["batch_images_sum{process=engine-0}"] >= 6, "a pass may be padded"
        assert found["networks_resident{process=engine-0}"] == 1
        assert found["engine_restarts_total{process=engine-0}"] == 0
        assert found["engine_requests_in_flight{process=jobs-0-1}"] == 0
        assert found["pixel_pool_free_bytes{process=jobs-0-1}"] > 0
        assert found["process_resident_memory_bytes{process=supervisor}"] > 1e7
        assert [name for name in found if name.startswith("queue_jobs")] == [
            f"queue_jobs{{priority={route}}}" for route in ROUTES
        ], "once, and not for each process"

        engine = of_role("engine", processes.family(process.pid), plant.folder / "worker.log")
        send(engine, signal.SIGSTOP)
        wait_for(lambda: plant.ask("/ready")[0] == 503, "that the engine is missed")
        assert plant.why("/ready")["engine-0"] == "does not answer"
        found = plant.metrics()
        assert [found[f"process_up{{process={name}}}"] for name in members] == [0, 1, 1]
        assert plant.ask("/live")[0] == 200
        send(engine, signal.SIGKILL)
        while plant.ask("/ready")[0] == 503:
            assert plant.metrics()["process_up{process=jobs-0-1}"] == 1
        assert plant.ask("/ready")[0] == 200
        found = plant.metrics()
        assert found["engine_restarts_total{process=engine-0}"] == 1
        assert found["worker_starts_total{process=engine-0}"] == 2
        assert found["process_up{process=engine-0}"] == 1
        assert plant.client.wait(plant.submit((1, 80, 90)), WAIT_S).status == "succeeded"
    assert "Traceback" not in (plant.folder / "worker.log").read_text()


def test_without_a_worker_events_are_delivered_and_lost_jobs_queued_again(
    plant: Plant, http_server: Any, answer: Any
) -> None:
    told = http_server.url("/told", answer(204))
    job = Job.parse(
        {
            "image": picture((1, 2, 3)),
            "network": tiny_network.NETWORK,
            "target": {"top_n": 1},
            "webhooks": [{"url": told, "events": ["job.queued"]}],
        }
    )
    plant.ledger.submit(job)
    lost = plant.ledger.claim(plant.ledger.read(job.id), WorkerRef(id="gone", device="cpu")).document
    assert lost.status == "running"
    command = [sys.executable, "-P", "-m", "gradcam_worker", "deliver"]
    with plant.running("deliver", command) as process:
        wait_for(lambda: plant.ask("/ready")[0] == 200, "readiness")
        wait_for(lambda: http_server.received, "a delivery")
        wait_for(lambda: plant.ledger.read(job.id).status == "queued", "that the job is queued again")
        wait_for(lambda: publisher.Publisher(plant.settings).queue_length("normal"), "its message")
        wait_for(lambda: plant.metrics()["jobs_reaped_total{reason=lost}"] == 1, "that it is counted")
        wait_for(lambda: plant.metrics().get("queue_jobs{priority=normal}") == 1, "the queue's metrics")
        wait_for(  # it was queued twice
            lambda: plant.metrics()["events_delivered_total{outcome=delivered}"] == 2, "that both are told"
        )
        assert plant.ask("/live")[0] == plant.ask("/startup")[0] == 200
        files = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in processes.family(process.pid))
        assert not [name for name in ("numpy", "tensorflow", "cv2", "obstore") if f"/{name}/" in files]
        process.terminate()
        assert process.wait(WAIT_S) == 0
    assert "Traceback" not in (plant.folder / "deliver.log").read_text()
