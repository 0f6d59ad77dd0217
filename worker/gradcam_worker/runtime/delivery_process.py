"""`gradcam deliver`: tells webhooks and the database, and puts jobs right, where no worker may be running.

Every worker does all of this, too. Where workers are scaled to zero somebody has to: this process needs no
device, and loads no array, picture or network library.
"""

import logging
import signal
from queue import SimpleQueue

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.delivery.webhooks import Webhooks
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability import tracing
from gradcam_worker.runtime import background
from gradcam_worker.runtime.telemetry import Telemetry
from gradcam_worker.schemas.ids import process_name
from gradcam_worker.settings import Settings

log = logging.getLogger("gradcam")


def run(settings: Settings) -> int:
    """Deliver until SIGTERM or SIGINT; return the exit code. Raises InvalidSettings."""
    signals = SimpleQueue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda one, _: signals.put(one))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    telemetry, me = Telemetry(settings), process_name()
    ledger, publisher = RedisLedger(settings), Publisher(settings)
    ledger.observer = telemetry.observer
    spans = tracing.connect(settings.traces, "gradcam-deliver", me)
    send = Webhooks(settings).send
    loops = background.build(settings, publisher, ledger, send, me, telemetry.observer, spans)
    names = ", ".join(loop.name for loop in loops)
    loops += telemetry.loops
    background.start(loops)
    telemetry.watch(loops)
    telemetry.begun()
    log.info("%s delivers: %s", me, names)
    signals.get()
    telemetry.ending()
    background.stop(loops)
    return 0
