"""The engine process: owns the device and the networks, and serves job processes.

It is the only process of a worker that imports the backend (TensorFlow). Here it is set up, watched and
ended; `gradcam_worker.inference.engine_server` serves.
"""

import os
import signal
import threading
from pathlib import Path

from gradcam_worker.errors import GradcamError, InternalError, InvalidSettings, MissingExtra
from gradcam_worker.inference.engine_server import EngineFacts, EngineServer
from gradcam_worker.observability import native_output, tracing
from gradcam_worker.observability.logs import configure_logging
from gradcam_worker.resilience.budget import limit_memory
from gradcam_worker.runtime import background, parent_watch, service_factory
from gradcam_worker.runtime.liveness import LivenessReporter
from gradcam_worker.runtime.processes import preflight
from gradcam_worker.runtime.processes.preloading import freeze_loaded_objects, preload
from gradcam_worker.runtime.telemetry import Telemetry
from gradcam_worker.schemas.ids import process_name
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

STOP_TIMEOUT_S = 10.0  # for a device that does not finish its batch


def run(settings: Settings, ready_fd: int, *, load: service_factory.Load | None = None) -> int:
    """Serve job processes until SIGTERM. Where the supervisor has ended, until the job processes have, too.

    Args:
        settings: Of this process; `engine_socket` is where it listens.
        ready_fd: The file descriptor for signs of life, see `gradcam_worker.runtime.liveness`.
        load: Loads a network, instead of `service_factory.load`.

    Returns:
        The exit code: EX_CONFIG for wrong settings, since then a restart is of no use.
    """
    configure_logging(settings.log_format, settings.log_level)
    try:
        with native_output.capture(settings.stderr_pipe):
            _serve(settings, ready_fd, load)
    except GradcamError as error:
        log.error("engine_failed", error=error)  # noqa: TRY400  # the error's sentence is enough
        return os.EX_CONFIG if isinstance(error, InvalidSettings | MissingExtra) else 1
    return 0


def _serve(settings: Settings, ready_fd: int, load: service_factory.Load | None) -> None:
    servers: list[EngineServer] = []

    def stop_without_supervisor() -> None:
        for server in servers:  # job processes finish their running jobs
            server.wait_until_unused(settings.shutdown_timeout_s)
        os._exit(1)

    parent_watch.on_parent_exit(stop_without_supervisor)  # before the device is asked, which may hang
    limit_memory(settings.memory_bytes)
    telemetry = Telemetry(settings)
    model_cache = service_factory.build_model_cache(settings, load, telemetry.observer)
    service_factory.prepare(settings)
    device = preflight.check_device(settings)
    facts = EngineFacts(device, on_gpu=service_factory.on_gpu(), max_batch=settings.max_batch)
    not_ready: list[str] = ["the networks of GRADCAM_PRELOAD are not loaded yet"]
    has_worked = threading.Event()

    def works() -> None:
        """Tell the supervisor that this engine works: its networks are loaded, or jobs wait for it."""
        has_worked.set()
        liveness.write_sign()

    server = EngineServer(
        model_cache,
        Path(str(settings.engine_socket)),
        facts,
        not_ready=lambda: not_ready[0] if not_ready else None,
        first_request=works,
        traces=tracing.connect(settings.traces, "gradcam-engine", process_name()),
    )
    liveness = LivenessReporter(
        ready_fd,
        broker_answers=None,
        other_reason=server.unhealthy_reason,
        starts=lambda: not has_worked.is_set(),
    )
    failures: list[GradcamError] = []

    def load_first() -> None:
        try:
            preload(settings, model_cache, telemetry.health)
            freeze_loaded_objects()
            not_ready.clear()
            works()
            telemetry.ready()
        except Exception as error:  # noqa: BLE001  # whatever it is, this engine will never be ready
            failures.append(error if isinstance(error, GradcamError) else InternalError.of(error))
            server.stop()

    def stop(*_: object) -> None:
        timer = threading.Timer(STOP_TIMEOUT_S, os._exit, [0])  # the device hangs: requests are sent again
        timer.daemon = True
        timer.start()
        server.stop()

    servers.append(server)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    telemetry.health.live["engine"] = telemetry.health.ready["engine"] = server.unhealthy_reason
    telemetry.add_device(lambda: model_cache.count)
    loops = background.start([liveness.loop])
    threading.Thread(target=load_first, name="preload", daemon=True).start()
    log.info("engine_started", device=device, socket=settings.engine_socket)
    server.serve()
    telemetry.stopping()
    background.stop(loops)
    if failures:
        raise failures[0]
    log.info("engine_stopped")
