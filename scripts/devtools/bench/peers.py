"""The same work in other libraries: the top 8 classes of one image and of eight, from the same layer of the
same network with the same weights. Each runs in a process of its own and has the machine to itself when it is
its turn; each is used in the fastest way that its documentation shows, is given preprocessed images and is
told the classes, which ours does and finds itself. A library is compared only where its maps, scaled to
[0, 1], are ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from devtools import import_path
from devtools.bench.peer_libraries import CLASSES, LIBRARIES, NETWORKS, OURS
from devtools.bench.report import (
    Figures,
    NothingToMeasure,
    Requirement,
    by_figure,
    plain,
    table,
    tiny,
    versions,
)
from devtools.bench.timing import Cost, Seconds, Variant, interleave
from devtools.environments import Environment, fingerprint

TITLE = "Other libraries"
PACKAGES = ("tensorflow", "keras", "numpy")
PEERS = [name for name in LIBRARIES if name != OURS]
BATCHES = (1, 8)  # images
ROUNDS = 5
PATIENCE_S = 5.0  # what takes longer is measured once: it is tens of times slower
TOLERANCE = 1e-4  # between maps scaled to [0, 1]; float32, summed in another order, differs by some 1e-6
PINS = Path(__file__).with_name("peers.txt")

Answer = dict[str, Any]


class Failed(Exception):
    """A library cannot do it; the message is its own."""


class Process:
    """A library loaded with a network in a process of its own, waiting for its turn."""

    def __init__(self, command: list[str]) -> None:
        """Start it; it is ready once `answer` has been read."""
        quiet = {**os.environ, **import_path(), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=quiet
        )

    def answer(self) -> Answer:
        """Return its next line. Raises Failed with its error, or with the end of its log."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            *_, last = ["without a word", *filter(str.strip, self._log)]
            message = f"ended with {self._process.wait()}: {last.strip()}"
            raise Failed(message)
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def ask(self, images: int, classes: int) -> Answer:
        """Let it explain, and wait until it has. Raises Failed."""
        print(json.dumps([images, classes]), file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """End it."""
        with self._process as ending:
            ending.kill()
        self._log.close()


def _own_clock(ask: Callable[[], Answer]) -> Seconds:
    """A library times itself: what is written to its process and read from it does not count."""
    answer = ask()
    return answer["wall"], answer["cpu"]


def compare(
    network: str, commands: Mapping[str, list[str]], batches: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Load one network in every library, then let them take turns. Raises Failed where ours does not run."""
    failed: dict[str, str] = {}
    differences: dict[str, list[Answer]] = {}
    costs: dict[str, dict[str, Cost]] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        processes: dict[str, Process] = {}

        def attempt(name: str, ask: Callable[[], Answer]) -> Answer | None:
            """A library that fails is left out, and the others go on."""
            try:
                return ask()
            except Failed as error:
                if name == OURS:
                    raise
                failed[name] = str(error)
                del processes[name]
                return None

        # One after the other, two cores being few; ours first, since it leaves behind what the others need.
        for name, command in commands.items():
            processes[name] = Process([*command, network, folder])
            stack.callback(processes[name].close)
            attempt(name, processes[name].answer)
        for batch in batches:
            variants = []
            for name, process in list(processes.items()):
                ask = partial(process.ask, batch, CLASSES)
                attempt(name, partial(process.ask, batch, 1))  # traces, and fills the caches
                if name in processes and (first := attempt(name, ask)):
                    differences.setdefault(name, []).append(first)
                    slow = first["wall"] > PATIENCE_S
                    run, repeats = (partial(dict, first), 1) if slow else (ask, rounds)
                    variants.append(Variant(name, batch, repeats, run, warm=True, clock=_own_clock))
            costs[str(batch)] = {cost.variant: cost for cost in interleave(variants)}
    agreement = {
        name: {
            "difference": max(answer["difference"] for answer in answers),
            "lit": min(answer["lit"] for answer in answers),
        }
        for name, answers in differences.items()
        if name not in failed
    }
    comparable = [
        name
        for name, same in agreement.items()
        if name != OURS and same["lit"] and same["difference"] <= TOLERANCE
    ]
    return {
        "times_peer": {
            batch: {
                name: {"wall": by[name].wall / by[OURS].wall, "cpu": by[name].cpu / by[OURS].cpu}
                for name in comparable
            }
            for batch, by in costs.items()
        },
        "images_per_s": {
            batch: {name: int(batch) / cost.wall for name, cost in by.items()} for batch, by in costs.items()
        },
        "agreement": agreement,
        "not_comparable": sorted({*agreement} - {OURS, *comparable}),
        "failed": failed,
    }


def pinned() -> dict[str, str]:
    """Package -> its version in peers.txt."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name: number for name, _, number in pins}


def install(folder: Path) -> Path:
    """Make the environment of the libraries where there is none; return its Python.

    Raises NothingToMeasure where they cannot be installed.
    """
    environment, wanted = Environment(folder), [fingerprint(PINS)]
    if environment.stamp != wanted:
        print(f"Making the environment {folder}: some minutes, about 1.5 GB of downloads.", file=sys.stderr)
        environment.create()
        reason = environment.pip("--no-deps", "-r", str(PINS))
        # Where only a torch for GPUs is available, it does not start without their libraries.
        imported = [str(environment.python), "-c", "import torch"]
        if not reason and subprocess.run(imported, capture_output=True, check=False).returncode:
            reason = environment.pip(f"torch=={pinned()['torch']}")
        if reason:
            message = f"The other libraries cannot be installed: {reason}"
            raise NothingToMeasure(message)
        environment.keep(*wanted)
    return environment.python


def measure(*, quick: bool) -> dict[str, Any]:
    """Make the environment where there is none, then compare one network after the other."""
    named = os.environ.get("BENCH_PEERS")  # no GRADCAM_: those are settings of the worker
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = install(Path(named) if named else cache / "gradcam-worker" / "peers")
    program = ["-P", "-m", "devtools.bench.peer_libraries"]
    commands = {name: [sys.executable if name == OURS else str(python), *program, name] for name in LIBRARIES}
    by_network = {}
    for network in NETWORKS:
        print(f"{network} ...", flush=True)
        by_network[network] = compare(
            network, commands, BATCHES[:1] if quick else BATCHES, 2 if quick else ROUNDS
        )
    pins = pinned()
    return {
        **by_figure(by_network),
        "versions": versions(PACKAGES) | {name: pins[name] for name in ("torch", *PEERS)},
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Ahead of each library, at its best, in wall and in CPU time."""
    for network, by_batch in figures["times_peer"].items():
        for batch, peers in by_batch.items():
            ratios = {peer: min(times.values()) for peer, times in peers.items()}
            closest = min(ratios, key=lambda peer: ratios[peer], default="none could be compared")
            least = ratios.get(closest, 0.0)
            what = f"{network}: faster than any other library, batch {batch} (the closest: {closest})"
            yield Requirement(what, "more than 1 times", f"{plain(least)} times", least > 1)


def blocks(figures: Figures) -> Iterator[str]:
    """Speeds and ratios, agreement, and who is not in the comparison."""
    rows = []
    for network, by_batch in figures["images_per_s"].items():
        for batch, speeds in by_batch.items():
            for name, speed in speeds.items():
                ahead = figures["times_peer"][network][batch].get(name)
                ratios = (plain(ahead["wall"]), plain(ahead["cpu"])) if ahead else ("", "")
                same = figures["agreement"][network].get(name)
                apart = tiny(same["difference"]) if same and name != OURS else ""
                rows.append((network, batch, name, plain(speed), *ratios, apart))
    headings = ("network", "batch", "library", "images/s", "ours faster by, wall", "CPU", "maps differ by")
    yield table(headings, rows)
    left_out = [
        f"{peer} does not run here, with {network}: {reason}."
        for network, failed in figures["failed"].items()
        for peer, reason in failed.items()
    ]
    left_out += [
        f"{peer} gives other maps than ours, with {network}: not compared."
        for network, peers in figures["not_comparable"].items()
        for peer in peers
    ]
    yield "\n".join(left_out or ["All of them run and agree."])
