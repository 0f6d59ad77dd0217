"""The worker of the attacks: the real one, supervisor and all, with a small network in place of Keras's.

    tiny_worker.py supervise    what `gradcam worker` does, with the settings of the environment
    tiny_worker.py work FD      what the supervisor starts

It starts in a second or two instead of ten, so that it can be killed hundreds of times. Everything but the
network and what the backend says of its device is the product's own: see `tiny_network`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from gradcam_worker import extras
from gradcam_worker.settings import Settings

SCRIPTS = Path(__file__).parents[2]
IMPORTED = (
    "devtools.faults.tiny_process",
    "devtools.bench.testbed",  # benches with simulated networks may be forks, too
    "gradcam_worker.runtime.processes.supervisor",
    "boto3",
)

_python: Callable[[], str | Path] = lambda: sys.executable  # noqa: E731  # see `forked`


def python(*words: str) -> list[str]:
    """How Python is called to run these workers, or whatever has much in common with them; see `forked`."""
    return [str(_python()), *words]


def command(program: str | Path = __file__) -> list[str]:
    """What starts a supervisor of these workers, or of those of a program that is made like this one."""
    return python("-P", str(program), "supervise")


@contextmanager
def forked(folder: Path) -> Iterator[None]:
    """Let `python` fork a process that has imported what these workers need.

    To start a supervisor and its worker takes 0.2 CPU seconds then, else 1.4.

    Args:
        folder: For that process, which starts when it is needed; an empty one, with a short path.
    """
    global _python  # noqa: PLW0603  # it is of the process
    from devtools import warm_python

    before = _python
    with ExitStack() as stack:

        @cache
        def start() -> Path:
            return stack.enter_context(warm_python.running(folder, IMPORTED)) / "python"

        _python = start
        try:
            yield
        finally:
            _python = before


def work(ready_fd: int) -> int:
    """What `gradcam worker --unsupervised --ready-fd` does."""
    sys.path.append(str(SCRIPTS))
    with extras.without_garbage_collection():
        from devtools.faults import tiny_process  # the supervisor needs nothing of it
    return tiny_process.run(ready_fd)


def supervise(program: str = __file__) -> int:
    """What `gradcam worker` does; `program work FD` is the worker process."""
    from gradcam_worker.observability.logs import configure_logging
    from gradcam_worker.runtime.processes import supervisor

    if "devtools.faults.tiny_process" in sys.modules:  # then a fork has it, too
        from devtools import forks

        setattr(supervisor, "subprocess", forks)  # noqa: B010  # it starts its workers with this module's
    settings = Settings.from_environment()
    configure_logging(settings.log_format, settings.log_level)
    return supervisor.Supervisor(settings, (sys.executable, "-P", program, "work")).run()


if __name__ == "__main__":
    sys.exit(supervise() if sys.argv[1] == "supervise" else work(int(sys.argv[2])))
