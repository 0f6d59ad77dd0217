"""One port for all processes of a host: over real sockets, with servers in place of the processes."""

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gradcam_worker.errors import InvalidSettings, LedgerUnavailable
from gradcam_worker.observability import health
from gradcam_worker.observability.health import Health
from gradcam_worker.observability.prometheus import CONTENT_TYPE, Metrics
from gradcam_worker.runtime.processes import host_telemetry
from gradcam_worker.runtime.processes.host_telemetry import NO_ANSWER, HostProcess, HostTelemetry
from gradcam_worker.settings import Settings

WAIT_S = 20
WELL = {"/ready", "/startup"}


def process(name: str, folder: Path) -> HostProcess:
    role, device = name.split("-")[:2]
    return HostProcess(name, int(device), role == "engine", folder / f"{name}.http", lambda: 3)


@dataclass
class Child:
    """What a process serves."""

    health: Health
    metrics: Metrics

    def fail(self, path: str, why: str | None) -> None:
        {"/ready": self.health.ready, "/startup": self.health.startup}[path]["networks"] = lambda: why


class Host:
    """Processes that serve, or do not yet, and their telemetry."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.processes = {name: process(name, folder) for name in names}
        self.telemetry = HostTelemetry([*self.processes.values()])

    def start(self, name: str, scrape: Callable[[], bytes] | None = None) -> Child:
        role = "engine" if self.processes[name].is_engine else "jobs"
        child = Child(Health(), Metrics(role=role))
        health.serve(self.processes[name].socket, child.health, scrape or child.metrics.scrape, CONTENT_TYPE)
        return child


def test_a_host_is_ready_while_one_device_has_a_warm_engine_and_a_job_process(tmp_path: Path) -> None:
    host = Host(tmp_path, "engine-0", "jobs-0-1", "jobs-0-2", "engine-1", "jobs-1-1")
    names = [*host.processes]
    assert host.telemetry.problems("/ready") == dict.fromkeys(names, NO_ANSWER)
    engine = host.start("engine-0")
    host.start("jobs-1-1")
    assert host.telemetry.problems("/ready") == dict.fromkeys(
        ["jobs-0-1", "jobs-0-2", "engine-1"], NO_ANSWER
    ), "an engine and a job process of different devices"
    for path in WELL:
        engine.fail(path, "not loaded yet: vgg16")
    jobs = host.start("jobs-0-1")
    assert host.telemetry.problems("/startup")["engine-0"] == "networks: not loaded yet: vgg16"  # type: ignore[index]
    for path in WELL:
        engine.fail(path, None)
        assert host.telemetry.problems(path) == {}
    jobs.fail("/ready", "none")
    assert host.telemetry.problems("/ready")["jobs-0-1"] == "networks: none"  # type: ignore[index]
    assert host.telemetry.problems("/startup") == {}
    host.start("jobs-0-2")
    assert host.telemetry.problems("/ready") == {}, "one job process is enough"
    host.telemetry.stopping()
    assert host.telemetry.problems("/ready") == {"supervisor": "is stopping"}
    assert host.telemetry.problems("/live") == host.telemetry.problems("/startup") == {}
    assert host.telemetry.problems("/") is None


def test_a_host_is_alive_while_its_supervisor_supervises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("gradcam_worker.runtime.processes.host_telemetry.time.monotonic", lambda: now_s[0])
    telemetry = Host(tmp_path, "engine-0").telemetry
    assert telemetry.problems("/live") == {}, "though no process answers"
    now_s[0] += host_telemetry.NO_TURN_S + 1
    assert telemetry.problems("/live") == {"supervisor": "has not supervised for 31 s"}
    telemetry.turned()
    assert telemetry.problems("/live") == {}


def test_one_port_shows_all_processes_and_which_of_them_are_down(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_nothing() -> Any:
        raise LedgerUnavailable

    monkeypatch.setattr(host_telemetry, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(host_telemetry, "depths_reader", lambda _: read_nothing)
    host = Host(tmp_path, "engine-0", "jobs-0-1", "jobs-0-2", "jobs-0-3", "jobs-0-4")
    host.start("engine-0").metrics.batch_computed(4, 0.1)
    host.start("jobs-0-1").metrics.message_handled("done")
    host.start("jobs-0-2", lambda: b'gradcam_build_info{version="')
    settings = Settings(metrics_port=free_port)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(host.processes["jobs-0-3"].socket))
        hung.listen(16)
        host.telemetry.serve(settings)
        text = ask(free_port, "/metrics")[1].decode()
        status, body = ask(free_port, "/ready")
    found = {
        (sample.name.removeprefix("gradcam_"), sample.labels["process"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in {"gradcam_process_up", "gradcam_worker_starts_total", "gradcam_batch_images_sum"}
    }
    up = {name: float(name in {"engine-0", "jobs-0-1"}) for name in host.processes}
    assert found == {
        **{("process_up", name): is_up for name, is_up in up.items()},
        **{("worker_starts_total", name): 3 for name in up},
        ("batch_images_sum", "engine-0"): 4,
    }
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert ask(free_port, "/live")[0] == 200
    assert ask(free_port, "/")[0] == 404
    with pytest.raises(InvalidSettings, match=f"GRADCAM_METRICS_PORT: 127.0.0.1:{free_port} cannot be"):
        host.telemetry.serve(settings)


def ask(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_socket_is_this_users_alone_replaces_a_dead_one_and_may_be_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "engine-0.http"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert health.serve(path, Health(), lambda: b"up 1\n", CONTENT_TYPE) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert health.ask(path, "/metrics", WAIT_S) == (200, b"up 1\n")
    with pytest.raises(InvalidSettings, match=r"GRADCAM_METRICS_SOCKET: .*/none/x cannot be listened at"):
        health.serve(tmp_path / "none" / "x", Health(), bytes, CONTENT_TYPE)


def test_a_socket_that_was_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "sockets" / "engine-0.http"
    path.parent.mkdir()
    health.serve(path, Health(), lambda: b"up 1\n", CONTENT_TYPE)
    for _ in range(2):
        path.unlink()
        path.parent.rmdir()
        end_s = time.monotonic() + WAIT_S
        while not path.exists():
            assert time.monotonic() < end_s
            time.sleep(0.02)
        assert health.ask(path, "/metrics", WAIT_S) == (200, b"up 1\n")
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "answer", [b"", b"\0\xff\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}"]
)
def test_a_process_that_breaks_off_or_speaks_no_http_does_not_answer(answer: bytes, tmp_path: Path) -> None:
    host = Host(tmp_path, "engine-0")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(host.processes["engine-0"].socket))
        server.listen()
        asked = host.telemetry._ask("/ready")
        caller, _ = server.accept()
        with caller:
            caller.recv(1000)
            caller.sendall(answer)
            caller.shutdown(socket.SHUT_WR)
            assert [said for _, said in asked()] == [None]


@pytest.mark.parametrize("body", [b"", b"[]", b'{"why": 3}', b"{}"])
def test_a_refusal_without_a_reason_is_one_nevertheless(body: bytes) -> None:
    assert host_telemetry._problem((http.client.SERVICE_UNAVAILABLE, body)) == "answers 503"
