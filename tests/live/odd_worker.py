"""The worker of `test_worst_days.py`: the real one, with a small network, on days when something is wrong.

    python odd_worker.py supervise      what `gradcam worker` does, with the settings of the environment
    python odd_worker.py work FD        what the supervisor starts

A poison picture kills the process. Where there is a file `hang` in the folder that ODD_FOLDER names, it is
taken away, and the consumer's loop hangs for ever. As long as there is a file `stuck`, images are decoded
for ever.
"""

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from devtools.faults import tiny_worker
from gradcam_worker import extras

HUNG_AFTER_S = 4.0  # without a turn of the loop: a test has not got half a minute
ANSWERED_S = 1.5  # ago: whoever has not answered since is away
FOLDER = Path(os.environ["ODD_FOLDER"])


def hang() -> None:
    """Never come back, once."""
    mark = FOLDER / "hang"
    if mark.exists():
        mark.unlink()
        time.sleep(3600)


def work(ready_fd: int) -> int:
    """`tiny_worker.work`, with a loop that can hang, and jobs that can be stuck."""
    with extras.without_garbage_collection():
        from gradcam_worker.broker.consumer import JobConsumer
        from gradcam_worker.observability import health
        from gradcam_worker.runtime import liveness

    prepare: Any = import_module("gradcam_worker.images.prepare")
    decode = prepare.decode

    def stuck(*args: Any, **options: Any) -> Any:
        while FOLDER.joinpath("stuck").exists():
            time.sleep(0.1)
        return decode(*args, **options)

    prepare.decode = stuck

    liveness.HUNG_AFTER_S = HUNG_AFTER_S
    health.PROBE_INTERVAL_S, health.UNREACHABLE_AFTER_S = 0.2, ANSWERED_S
    ready = JobConsumer.on_ready

    def on_ready(self: JobConsumer) -> None:
        ready(self)
        self.timer.call_repeatedly(0.1, hang)

    JobConsumer.on_ready = on_ready  # type: ignore[method-assign]
    return tiny_worker.work(ready_fd)


if __name__ == "__main__":
    sys.exit(tiny_worker.supervise(__file__) if sys.argv[1] == "supervise" else work(int(sys.argv[2])))
