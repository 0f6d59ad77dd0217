"""What the worker of the attacks runs below its supervisor: see `tiny_worker`."""

from devtools.faults import tiny_network

tiny_network.do_without_keras()

from gradcam_worker.images import prepare  # noqa: E402
from gradcam_worker.inference.pixel_pool import Block  # noqa: E402
from gradcam_worker.runtime.processes import engine_process, worker_process  # noqa: E402
from gradcam_worker.settings import Settings  # noqa: E402


def run(ready_fd: int) -> int:
    """What `gradcam worker --unsupervised --ready-fd` does."""
    settings = Settings.from_environment()
    if settings.role == "engine":
        return engine_process.run(settings, ready_fd, load=lambda _: tiny_network.Poisonable())
    prepare.decode = tiny_network.panicking(prepare.decode)  # type: ignore[attr-defined]
    Block.write = tiny_network.hit_in_write(Block.write)  # type: ignore[method-assign]
    settings = settings.model_copy(update={"engine_pool_bytes": tiny_network.POOL_BYTES})
    return worker_process.run(settings, ready_fd=ready_fd, load=lambda _: tiny_network.Poisonable())
