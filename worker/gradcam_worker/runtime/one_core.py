"""Keeps a process on one core at a time.

Python runs one thread at a time. Where the threads of a process are on several cores, each call that gives
the interpreter up wakes a thread on another core: a job takes more CPU time, and no less wall time (see
`scripts/bench job_cpu`). So all threads of a job process are bound to one core, and from time to time to the
one on which the system wakes a thread that may run anywhere: an idle one, if there is any.
"""

import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from gradcam_worker.resilience.background_loop import BackgroundLoop

INTERVAL_S = 2.0  # between two choices
SLEEP_S = 0.001  # the system chooses a core when a thread wakes
PROCESSOR = 36  # in `stat` after the name: the core on which the thread runs
THREADS = Path("/proc/self/task")
ANY = range(8192)  # more than Linux knows; it leaves out those that the container does not have


def keep_on_one_core(interval_s: float = INTERVAL_S) -> BackgroundLoop | None:
    """Make a loop that binds this process to one core, and chooses it anew from time to time.

    Args:
        interval_s: The seconds between two choices.

    Returns:
        The loop, not started; None where there is no other core, or the system cannot bind threads.
    """
    if not hasattr(os, "sched_setaffinity") or not THREADS.is_dir():
        return None
    if len(os.sched_getaffinity(0)) == 1:
        return None
    try:
        cores = choices()
    except OSError:  # a sandbox forbids it
        return None
    return BackgroundLoop("one core", lambda: bind(idle_core(cores)), interval_s, immediately=True)


def choices() -> Collection[int]:
    """Find the cores among which this process may choose.

    Returns:
        Those of its affinity; ANY where these are all of its container's, which may get others later.
    """
    given = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ANY)
    has_all = os.sched_getaffinity(0) == given
    os.sched_setaffinity(0, given)
    return ANY if has_all else given


def idle_core(cores: Collection[int]) -> int:
    """Let the system choose one of these cores for this thread.

    Args:
        cores: Those that this process may use.

    Returns:
        An idle core, if there is any.
    """
    thread = threading.get_native_id()
    try:
        os.sched_setaffinity(thread, cores)
    except OSError:  # the system has taken all of them away from this process: it may use others
        os.sched_setaffinity(thread, ANY)
    time.sleep(SLEEP_S)
    *_, numbers = (THREADS / str(thread) / "stat").read_text(encoding="utf-8").rpartition(")")
    return int(numbers.split()[PROCESSOR])


def bind(core: int) -> None:
    """Bind all threads of this process to a core. Those that they start later are bound to it, too."""
    for thread in THREADS.iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), {core})
