"""What a process shows of itself where its operator asks for it: metrics, health, and the server for both."""

from collections.abc import Callable, Sequence
from functools import partial

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.ledger.redis import stats
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability import gpu, health
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.observability.health import Health, ServerProbes
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.runtime import devices
from gradcam_worker.settings import Settings

ANSWER_S = 2.0  # that broker and ledger have, to show that they are there


class Telemetry:
    """Nothing, and at no cost, where there is no `metrics_port`."""

    def __init__(self, settings: Settings) -> None:
        """Whoever asks is answered from now on. Raises InvalidSettings."""
        self._settings, self.health = settings, Health()
        self._not_yet: str | None = "has not begun yet"
        self._not_started: str | None = self._not_yet
        self.health.ready["process"] = lambda: self._not_yet
        self.health.startup["process"] = lambda: self._not_started
        self.loops: list[BackgroundLoop] = []
        self.observer: Observer = NULL_OBSERVER
        self._metrics = None
        if not settings.metrics_port:
            return
        from gradcam_worker.observability.prometheus import CONTENT_TYPE, Metrics

        self.observer = self._metrics = Metrics(settings.starts)
        ledger = RedisLedger(settings, timeout_s=ANSWER_S, retries=0)
        publisher = Publisher(settings, timeout_s=ANSWER_S)
        probes = ServerProbes(
            {"broker": partial(publisher.queue_length, "normal"), "ledger": ledger.count_jobs}
        )
        self.loops.append(probes.loop)
        for name in ("broker", "ledger"):
            self.health.ready[name] = partial(probes.check, name)
        self._metrics.set_ledger_gauges(partial(stats.read_depths, ledger.server, settings.lease_s))
        self._metrics.set_gauge("ready", lambda: not self.health.problems("/ready"))
        place = settings.metrics_host, settings.metrics_port
        health.serve(*place, self.health, self._metrics.scrape, CONTENT_TYPE)

    def ask_worker(
        self, resident: Callable[[], int], breaker: CircuitBreaker, eviction: health.Check
    ) -> None:
        """Show the networks that are loaded, whether storage and Redis are well, and what the GPU does."""
        self.health.ready["storage"] = lambda: breaker.open_reason
        self.health.ready["eviction"] = eviction
        if not self._metrics:
            return
        self._metrics.set_gauge("networks_resident", resident)
        self._metrics.set_gauge("breaker_open", lambda: bool(breaker.open_reason))
        gpus = devices.visible_gpus(self._settings.environment_for_child())
        if gpus and (use := gpu.usage_reader(gpus[0])):
            self._metrics.set_device_gauges(use)

    def started(self) -> None:
        """The process has all that it brings itself: from now on it waits for nobody but others."""
        self._not_started = None

    def begun(self) -> None:
        """The process does what it is for."""
        self._not_started = self._not_yet = None

    def ending(self) -> None:
        """It takes nothing new any more."""
        self._not_yet = "is stopping"

    def watch(self, loops: Sequence[BackgroundLoop]) -> Callable[[], str | None]:
        """The process lives as long as these do; what is returned says which have ended, if any."""

        def ended() -> str | None:
            names = [loop.name for loop in loops if not loop.alive]
            return f"ended: {', '.join(names)}" if names else None

        self.health.live["threads"] = ended
        return ended
