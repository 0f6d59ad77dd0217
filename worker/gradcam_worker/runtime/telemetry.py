"""The metrics and health checks of a process, and the HTTP server for both."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.ledger.redis import stats
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability import gpu, health
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.observability.health import Health, ServerProbes
from gradcam_worker.observability.queue_depths import QueueDepths
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.runtime import devices
from gradcam_worker.settings import Settings

if TYPE_CHECKING:
    from gradcam_worker.inference.engine_client import EngineClient

ANSWER_TIMEOUT_S = 2.0  # of broker and ledger


def depths_reader(settings: Settings, ledger: RedisLedger | None = None) -> Callable[[], QueueDepths]:
    """Return what reads the ledger's gauges. It raises LedgerUnavailable after a short time."""
    ledger = ledger or _impatient_ledger(settings)
    return partial(stats.read_depths, ledger.server, settings.lease_s)


def _impatient_ledger(settings: Settings) -> RedisLedger:
    return RedisLedger(settings, timeout_s=ANSWER_TIMEOUT_S, retries=0)


class Telemetry:
    """The metrics and health of this process.

    Without `metrics_port` and `metrics_socket` there is no server, and no cost.
    """

    def __init__(self, settings: Settings) -> None:
        """Start the server. Raises InvalidSettings where the port cannot be used."""
        self._settings, self.health = settings, Health()
        self._unready_reason: str | None = "has not begun yet"
        self._starting_reason: str | None = self._unready_reason
        self.health.ready["process"] = lambda: self._unready_reason
        self.health.startup["process"] = lambda: self._starting_reason
        self.loops: list[BackgroundLoop] = []
        self.observer: Observer = NULL_OBSERVER
        self._metrics = None
        if not (settings.metrics_port or settings.metrics_socket):
            return
        from gradcam_worker.observability.prometheus import CONTENT_TYPE, Metrics

        self.observer = self._metrics = Metrics(settings.starts, settings.role)
        if settings.role != "engine":
            ledger = _impatient_ledger(settings)
            self._watch_servers(settings, ledger)
            if settings.role == "worker":  # else the supervisor reads them, once for all processes
                self._metrics.set_ledger_gauges(depths_reader(settings, ledger))
        self._metrics.set_gauge("ready", lambda: not self.health.problems("/ready"))
        address = settings.metrics_socket or (settings.metrics_host, settings.metrics_port)
        health.serve(address, self.health, self._metrics.scrape, CONTENT_TYPE)

    def _watch_servers(self, settings: Settings, ledger: RedisLedger) -> None:
        """Be ready only while broker and ledger answer."""
        publisher = Publisher(settings, timeout_s=ANSWER_TIMEOUT_S)
        probes = ServerProbes(
            {"broker": partial(publisher.queue_length, "normal"), "ledger": ledger.count_jobs}
        )
        self.loops.append(probes.loop)
        for name in ("broker", "ledger"):
            self.health.ready[name] = partial(probes.check, name)

    def add_worker(
        self, loaded_networks: Callable[[], int], breaker: CircuitBreaker, redis_checks: ServerMonitor
    ) -> None:
        """Add the checks and gauges of a worker process.

        Args:
            loaded_networks: The number of networks in memory.
            breaker: The circuit breaker of the storage.
            redis_checks: Checks how Redis is set up.
        """
        self.health.ready["storage"] = lambda: breaker.unready_reason
        self.add_redis_checks(redis_checks)
        if not self._metrics:
            return
        self._metrics.set_gauge("breaker_open", lambda: bool(breaker.open_reason))
        if self._settings.role == "worker":
            self.add_device(loaded_networks)

    def add_redis_checks(self, checks: ServerMonitor) -> None:
        """Be ready only while Redis loses no accepted job and takes writes; show the gauge of its checks."""
        self.health.ready["redis"] = checks.last_problem
        if self._metrics:
            self._metrics.set_redis_checks(checks.is_failing)

    def add_engine(self, engine: "EngineClient") -> None:
        """Add the check and the gauges of a process whose engine is another one."""
        self.health.ready["engine"] = lambda: engine.not_ready
        if self._metrics:
            self._metrics.set_gauge("engine_requests_in_flight", lambda: engine.in_flight)
            self._metrics.set_gauge("pixel_pool_free_bytes", lambda: engine.free_bytes)

    def add_device(self, loaded_networks: Callable[[], int]) -> None:
        """Add the gauges of the device, and of the networks in its process.

        Args:
            loaded_networks: The number of networks in memory.
        """
        if not self._metrics:
            return
        self._metrics.set_gauge("networks_resident", loaded_networks)
        gpus = devices.visible_gpus(self._settings.environment_for_child())
        if gpus and (read_usage := gpu.usage_reader(gpus[0])):
            self._metrics.set_device_gauges(read_usage)

    def started(self) -> None:
        """Report that the process has loaded what it needs: from now on it waits for servers only."""
        self._starting_reason = None

    def ready(self) -> None:
        """Report that the process does its work."""
        self._starting_reason = self._unready_reason = None

    def stopping(self) -> None:
        """Report that the process takes no new work."""
        self._unready_reason = "is stopping"

    def require_alive(self, loops: Sequence[BackgroundLoop]) -> Callable[[], str | None]:
        """Make the process unhealthy as soon as one of these loops has ended.

        Returns:
            A function that names the ended loops, if any.
        """

        def ended_loops() -> str | None:
            names = [loop.name for loop in loops if not loop.alive]
            return f"ended: {', '.join(names)}" if names else None

        self.health.live["threads"] = ended_loops
        return ended_loops
