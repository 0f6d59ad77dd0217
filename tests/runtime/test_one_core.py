import errno
import os
import subprocess
import sys
from collections.abc import Collection

import pytest

from gradcam_worker.runtime import one_core

THREADS = """
import os, threading
from gradcam_worker.runtime import one_core

def affinities():
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}

cores = os.sched_getaffinity(0)
over = threading.Event()
for _ in range(4):
    threading.Thread(target=over.wait).start()
"""
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine has one core")


def run(program: str) -> str:
    """Run a program in a process of its own: it binds all of its threads."""
    words = [sys.executable, "-P", "-c", f"{THREADS}{program}\nover.set()"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.stdout.strip()


def test_all_threads_are_bound_to_one_core_and_so_are_those_they_start() -> None:
    assert (
        run("""
core = min(cores)
one_core.bind(core)
threading.Thread(target=over.wait).start()
print(affinities() == {frozenset([core])}, threading.active_count())
""")
        == "True 6"
    )


def test_a_core_is_chosen_among_those_that_the_process_may_use() -> None:
    assert (
        run("""
one_core.bind(max(cores))
chosen = one_core.idle_core({min(cores)})
one_core.bind(one_core.idle_core(cores))
print(chosen == min(cores), affinities() <= {frozenset([core]) for core in cores}, len(affinities()))
""")
        == "True True 1"
    )


def test_where_its_cores_are_taken_away_it_chooses_another() -> None:
    assert run("print(one_core.idle_core({10_000}) in cores)") == "True"


class Container:
    """What a container may do with the cores of its process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: set[int], given: set[int]) -> None:
        self.cores, self.affinity = cores, given
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*self.affinity})
        monkeypatch.setattr(os, "sched_setaffinity", self.bind)

    def bind(self, _: int, wanted: Collection[int]) -> None:
        """As the system does."""
        if not self.cores.intersection(wanted):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.affinity = self.cores.intersection(wanted)


def test_cores_that_a_container_gets_later_are_chosen_among(monkeypatch: pytest.MonkeyPatch) -> None:
    container = Container(monkeypatch, {0, 1}, given={0, 1})
    cores = one_core.choices()
    assert container.affinity == {0, 1}
    for container.cores in ({0, 1, 2, 3}, {7, 70}):
        one_core.idle_core(cores)
        assert container.affinity == container.cores


def test_a_process_that_is_kept_to_some_cores_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    container = Container(monkeypatch, {0, 1, 2, 3}, given={1, 2})
    one_core.idle_core(one_core.choices())
    assert container.affinity == {1, 2}


@needs_two_cores
def test_a_process_leaves_a_core_that_another_one_keeps_busy() -> None:
    assert (
        run("""
import subprocess, sys, time
first = max(cores)
one_core.bind(first)
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the core
os.sched_setaffinity(0, cores)
deadline = time.monotonic() + 50
try:
    while one_core.idle_core(cores) == first and time.monotonic() < deadline:
        pass
    print(time.monotonic() < deadline)
finally:
    busy.kill()
    busy.wait()
""")
        == "True"
    )


def test_a_process_with_one_core_is_left_alone() -> None:
    assert run("one_core.bind(min(cores)); print(one_core.keep_on_one_core())") == "None"


@needs_two_cores
def test_the_loop_binds_at_once() -> None:
    assert (
        run("""
import time
loop = one_core.keep_on_one_core(0.01)
loop.start()
while {len(cores) for cores in affinities()} != {1}:
    time.sleep(0.01)
print(loop.stop(timeout_s=30))
""")
        == "True"
    )


def test_a_sandbox_that_forbids_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert one_core.keep_on_one_core() is None
