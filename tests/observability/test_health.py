"""What a process says of itself over HTTP, whoever asks and however."""

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from gradcam_worker.errors import BrokerUnavailable, InvalidSettings
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.network import GRADCAM
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.observability import health
from gradcam_worker.observability.health import Health, ServerProbes
from gradcam_worker.resilience.background_loop import BackgroundLoop, stop_all
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.runtime.liveness import LivenessReporter
from gradcam_worker.runtime.telemetry import Telemetry
from gradcam_worker.settings import Settings
from gradcam_worker.testing import TinyNetwork

HOST = "127.0.0.1"
WAIT_S = 20


class Served:
    """A server, and what it says."""

    def __init__(self, scrape: Callable[[], bytes] = lambda: b"up 1\n") -> None:
        self.health, self.scrape = Health(), scrape
        self.port = health.serve((HOST, 0), self.health, scrape, "text/plain; version=0.0.4")

    def ask(self, path: str, method: str = "GET") -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def said(self, path: str) -> tuple[int, Any]:
        status, body = self.ask(path)
        return status, json.loads(body)

    @contextlib.contextmanager
    def callers(self, count: int) -> Iterator[list[socket.socket]]:
        """So many who connect and say half a word."""
        with contextlib.ExitStack() as stack:
            made = [stack.enter_context(socket.create_connection((HOST, self.port))) for _ in range(count)]
            for one in made:
                one.sendall(b"GET /li")
            yield made


@pytest.fixture
def served() -> Served:
    return Served()


def test_each_path_says_whether_all_is_well_and_why_not(served: Served) -> None:
    trouble: dict[str, str | None] = {"loop": None, "broker": "has not answered yet", "networks": "none"}
    served.health.live["loop"] = lambda: trouble["loop"]
    served.health.ready["broker"] = lambda: trouble["broker"]
    served.health.startup["networks"] = lambda: trouble["networks"]
    assert served.said("/live") == (200, {"status": "ok"})
    no = (503, {"status": "unavailable", "why": {"broker": "has not answered yet"}})
    assert served.said("/ready") == no
    assert served.said("/startup") == (503, {"status": "unavailable", "why": {"networks": "none"}})
    trouble["networks"] = None
    assert served.said("/startup") == (200, {"status": "ok"}), "who waits for a broker has started"
    trouble["broker"] = None
    assert served.said("/ready?verbose=1") == (200, {"status": "ok"})
    trouble |= {"broker": "has not answered for 12 s", "loop": "it stands still"}
    assert served.said("/ready")[0] == 503
    assert served.said("/startup") == (200, {"status": "ok"})
    assert served.said("/live") == (503, {"status": "unavailable", "why": {"loop": "it stands still"}})
    assert served.ask("/metrics") == (200, "up 1\n")
    assert served.ask("/metrics", "HEAD") == (200, "")
    assert served.said("/") == (404, {"error": "there are /metrics, /live, /ready and /startup"})
    assert served.ask("/live", "POST")[0] == 501


def test_what_cannot_be_said_is_an_error_and_the_next_one_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mistakes = cycle([RuntimeError("surprise"), SystemExit("surprise")])

    def scrape() -> bytes:
        raise next(mistakes)

    served = Served(scrape)
    with caplog.at_level(logging.ERROR):
        assert [served.ask("/metrics")[0] for _ in range(2 * health.THREADS)] == [500] * 2 * health.THREADS
    assert "surprise" in caplog.text
    assert served.ask("/live")[0] == 200


def test_callers_that_never_end_are_sent_away_and_no_thread_is_made_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "MAX_CALL_S", 0.5)
    served = Served()
    before = threading.active_count()
    with served.callers(health.THREADS + health.MAX_WAITING_CALLERS + 5) as callers:
        assert threading.active_count() == before
        end = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if served.ask("/live")[0] == 200:
                    break
            assert time.monotonic() < end
        for one in callers:
            one.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1000) == b"", "each of them was left without an answer"


def test_a_port_that_is_taken_stops_the_worker_with_a_sentence(settings: Settings) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InvalidSettings, match=rf"GRADCAM_METRICS_PORT: 127.0.0.1:{port} cannot be listened"
        ):
            Telemetry(settings.model_copy(update={"metrics_port": port}))


def test_whoever_does_not_answer_is_away_after_a_while_and_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, failure = [100.0], [BrokerUnavailable("gone"), None, RuntimeError("surprise"), None]
    monkeypatch.setattr("gradcam_worker.observability.health.time.monotonic", lambda: now[0])

    def ask() -> None:
        if error := failure.pop(0):
            raise error

    probes = ServerProbes({"broker": ask})
    probes.probe_all()
    assert probes.check("broker") == "has not answered yet"
    probes.probe_all()
    assert probes.check("broker") is None
    now[0] += health.UNREACHABLE_AFTER_S - 1
    probes.probe_all()
    assert probes.check("broker") is None, "once is chance"
    now[0] += 3
    assert probes.check("broker") == "has not answered for 12 s"
    probes.probe_all()
    assert probes.check("broker") is None


def test_without_a_port_there_is_no_server_and_nobody_is_asked(settings: Settings) -> None:
    before = threading.active_count()
    telemetry = Telemetry(settings)
    assert threading.active_count() == before
    assert not telemetry.loops


def test_a_long_pass_leaves_the_process_alive_and_ready() -> None:
    begun, over = threading.Event(), threading.Event()

    class Long(TinyNetwork):
        def begin(self, *args: Any, **others: Any) -> Any:
            begun.set()
            over.wait(WAIT_S)
            return super().begin(*args, **others)

    model_cache = ModelCache(lambda _: Long(), max_batch=1)
    network = model_cache.load(CATALOG[TinyNetwork.facts.name])
    liveness = LivenessReporter(None, broker_answers=lambda: True, other_reason=lambda: model_cache.failure)
    liveness.loop.start()
    served = Served()
    served.health.live["loop"] = lambda: liveness.last_reason
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    work = (network, pixels, (-1,), GRADCAM, Deadline(WAIT_S))
    threading.Thread(target=model_cache.infer_many, args=work, daemon=True).start()
    assert begun.wait(WAIT_S)
    assert served.ask("/live")[0] == served.ask("/ready")[0] == 200
    over.set()
    assert liveness.loop.stop(WAIT_S)


def test_a_thread_that_ended_is_the_end_of_the_process(settings: Settings) -> None:
    telemetry = Telemetry(settings)
    loops = [BackgroundLoop(name, lambda: None, WAIT_S) for name in ("leases", "reaper")]
    for one in loops:
        one.start()
    telemetry.require_alive(loops)
    assert telemetry.health.problems("/live") == {}
    assert stop_all(loops, WAIT_S) == []
    assert telemetry.health.problems("/live") == {"threads": "ended: leases, reaper"}


def test_a_process_has_started_before_it_is_let_in_and_has_when_it_ends(settings: Settings) -> None:
    telemetry = Telemetry(settings)

    def unwell() -> list[bool]:
        return [bool(telemetry.health.problems(path)) for path in ("/live", "/startup", "/ready")]

    assert unwell() == [False, True, True]
    telemetry.started()
    assert unwell() == [False, False, True], "a broker that is away is no reason to begin again"
    telemetry.ready()
    assert unwell() == [False, False, False]
    telemetry.stopping()
    assert unwell() == [False, False, True]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_is_those_of_ipv6_and_of_ipv4() -> None:
    """Kubernetes asks a pod at its first address, which is one of IPv6 in some clusters."""
    port = health.serve(("::", 0), Health(), lambda: b"", "text/plain")
    for host in ("::1", "127.0.0.1"):
        with socket.create_connection((host, port), timeout=WAIT_S):
            pass


def test_every_address_of_a_machine_without_ipv6_is_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    port = health.serve(("::", 0), Health(), lambda: b"", "text/plain")
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S):
        pass
