"""`gradcam deliver`: notifies webhooks, writes to the database and recovers jobs while no worker runs.

Every worker does the same. Where workers are scaled to zero, this process does it: it needs no device, and
loads no library of arrays, images or networks.
"""

import logging
import signal
from queue import SimpleQueue

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.delivery.webhooks import Webhooks
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability import tracing
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.runtime import background
from gradcam_worker.runtime.telemetry import Telemetry
from gradcam_worker.schemas.ids import process_name
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")


def run(settings: Settings) -> int:
    """Deliver until SIGTERM or SIGINT; return the exit code. Raises InvalidSettings."""
    signals = SimpleQueue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.put(received))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    telemetry, process = Telemetry(settings), process_name()
    ledger, publisher = RedisLedger(settings), Publisher(settings)
    ledger.observer = telemetry.observer
    spans = tracing.connect(settings.traces, "gradcam-deliver", process)
    send = Webhooks(settings).send
    loops = background.build(settings, publisher, ledger, send, process, telemetry.observer, spans)
    delivery_loops = [loop.name for loop in loops]
    checks = ServerMonitor(settings)
    telemetry.add_redis_checks(checks)
    loops += [checks.loop, *telemetry.loops]
    background.start(loops)
    telemetry.require_alive(loops)
    telemetry.ready()
    log.info("delivery_process_started", process=process, loops=delivery_loops)
    signals.get()
    telemetry.stopping()
    background.stop(loops)
    return 0
