"""The worker of the attacks: the real one, supervisor and all, with a small network in place of Keras's.

    tiny_worker.py supervise    what `gradcam worker` does, with the settings of the environment
    tiny_worker.py work FD      what the supervisor starts

It starts in a second or two instead of ten, so that it can be killed hundreds of times. Everything but the
network and what the backend says of its device is the product's own: see `tiny_network`.
"""

import sys
from pathlib import Path

from gradcam_worker import extras
from gradcam_worker.settings import Settings

SCRIPTS = Path(__file__).parents[2]


def work(ready_fd: int) -> int:
    """What `gradcam worker --unsupervised --ready-fd` does."""
    sys.path.append(str(SCRIPTS))
    with extras.without_garbage_collection():
        from devtools.faults import tiny_network  # the supervisor needs nothing of it

        tiny_network.do_without_keras()
        from gradcam_worker.images import prepare
        from gradcam_worker.inference.pixel_pool import Block
        from gradcam_worker.runtime import engine_process, worker_process
    settings = Settings.from_environment()
    if settings.role == "engine":
        return engine_process.run(settings, ready_fd, load=lambda _: tiny_network.Poisonable())
    prepare.decode = tiny_network.panicking(prepare.decode)  # type: ignore[attr-defined]
    Block.write = tiny_network.hit_in_write(Block.write)  # type: ignore[method-assign]
    settings = settings.model_copy(update={"engine_pool_bytes": tiny_network.POOL_BYTES})
    return worker_process.run(settings, ready_fd=ready_fd, load=lambda _: tiny_network.Poisonable())


def supervise(program: str = __file__) -> int:
    """What `gradcam worker` does; `program work FD` is the worker process."""
    from gradcam_worker.observability.logs import configure_logging
    from gradcam_worker.runtime.supervisor import Supervisor

    settings = Settings.from_environment()
    configure_logging(settings.log_format, settings.log_level)
    return Supervisor(settings, (sys.executable, "-P", program, "work")).run()


if __name__ == "__main__":
    sys.exit(supervise() if sys.argv[1] == "supervise" else work(int(sys.argv[2])))
