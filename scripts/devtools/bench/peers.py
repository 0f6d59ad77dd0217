"""Ours against other libraries: Grad-CAM of the top 8 classes, same layer, logits and seeded weights.

torchcam, grad-cam (pytorch_grad_cam), captum, tf-keras-vis and xplique run in an environment of their own,
each in a process of its own, on VGG16 and Xception built with our weights; of the ways to use a library the
fastest that its documentation shows. All are loaded beforehand and take turns: whoever's turn it is has the
machine. In their favour: they are given preprocessed images and are told the classes, which ours does and
finds itself. A library whose maps are not ours is not comparable; one that cannot be installed or run is
named, with the reason.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from devtools.bench.peer_environment import Environment
from devtools.bench.peer_process import Failed, Process
from devtools.bench.timing import Cost, machine, versions

HERE = Path(__file__).parent
PEERS = {
    "torchcam": "peer_torch.py",
    "grad-cam": "peer_torch.py",
    "captum": "peer_torch.py",
    "tf-keras-vis": "peer_keras.py",
    "xplique": "peer_keras.py",
}
NETWORKS = ("vgg16", "xception")
OURS = "ours"
CLASSES = 8
BATCHES = (1, 8)  # images
ROUNDS = 5
PATIENCE_S = 5.0  # what takes longer is measured once: it is tens of times slower
TOLERANCE = 1e-4  # between maps scaled to [0, 1]; float32, summed in another order, differs by some 1e-6


@dataclass
class Result:
    """What was found out about one network."""

    network: str
    costs: dict[tuple[str, int], Cost] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)  # the worst over all batch sizes
    failed: dict[str, str] = field(default_factory=dict)  # library -> why it was not measured to the end

    @property
    def comparable(self) -> list[str]:
        """The libraries whose maps are ours."""
        return [
            peer
            for peer, same in self.agreement.items()
            if peer not in self.failed and same["lit"] and same["difference"] <= TOLERANCE
        ]

    def ahead(self, peer: str, batch: int) -> dict[str, float]:
        """How many times faster ours is, in wall and in CPU time."""
        ours, theirs = self.costs[OURS, batch], self.costs[peer, batch]
        return {"wall": theirs.wall / ours.wall, "cpu": theirs.cpu / ours.cpu}

    def batches(self) -> list[int]:
        """The batch sizes that were measured."""
        return [batch for name, batch in self.costs if name == OURS]

    def passed(self) -> bool:
        """Something could be compared, and ours is ahead of it everywhere, in both kinds of time."""
        ratios = [self.ahead(peer, batch) for peer in self.comparable for batch in self.batches()]
        return bool(ratios) and all(min(both.values()) > 1 for both in ratios)


def measure(network: str, commands: Mapping[str, list[str]], batches: tuple[int, ...], rounds: int) -> Result:
    """Load one network in every library, then let them take turns. Raises Failed where ours does not run."""
    result, processes = Result(network), dict[str, Process]()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        # One after the other, two cores being few; ours first, since it leaves behind what the others need.
        for name, command in commands.items():
            processes[name] = Process([*command, network, folder])
            stack.callback(processes[name].close)
            attempt(name, processes[name].answer, processes, result)
        for batch in batches:
            for name, process in list(processes.items()):
                for classes in (1, CLASSES) if name == OURS else (1,):  # traces, and fills the caches
                    attempt(name, partial(process.ask, f"run {batch} {classes}"), processes, result)
            take_turns(processes, batch, rounds, result)
    return result


def attempt(
    name: str, do: Callable[[], dict[str, Any]], processes: dict[str, Process], result: Result
) -> dict[str, Any]:
    """What a library answers; nothing where it fails: we go on without it. Raises Failed if it is ours."""
    try:
        return do()
    except Failed as failed:
        if name == OURS:
            raise
        result.failed[name] = str(failed)
        processes.pop(name, None)
        return {}


def take_turns(processes: dict[str, Process], batch: int, rounds: int, result: Result) -> None:
    """Each once a round, every other round backwards; the slow ones once. In the first, maps are compared."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
    for turn in range(rounds):
        order = list(processes.items())
        for name, process in order if turn % 2 == 0 else reversed(order):
            if turn and measured[name][0][0] > PATIENCE_S:
                continue
            if took := attempt(name, partial(process.ask, f"run {batch} {CLASSES}"), processes, result):
                measured[name].append((took["wall"], took["cpu"]))
                if turn == 0 and name == OURS:
                    process.ask("keep")
                elif turn == 0:
                    same = attempt(name, partial(process.ask, "compare"), processes, result)
                    if same and same["difference"] >= result.agreement.get(name, same)["difference"]:
                        result.agreement[name] = same
    for name in processes:
        wall, cpu = (median(column) for column in zip(*measured[name], strict=True))
        result.costs[name, batch] = Cost(name, batch, len(measured[name]), wall, cpu)


def table(result: Result) -> Iterator[str]:
    """One network's figures, line by line."""
    yield f"{result.network}, top {CLASSES} classes, medians"
    yield (
        f"  {'library':<14}{'batch':>6}{'repeats':>9}{'wall s':>9}{'CPU s':>9}{'images/s':>10}"
        f"{'ours faster by: wall':>22}{'CPU':>7}{'maps differ by':>16}"
    )
    for (name, batch), cost in result.costs.items():
        ahead = result.ahead(name, batch)
        same = result.agreement.get(name, {}).get("difference")
        yield (
            f"  {name:<14}{batch:>6}{cost.repeats:>9}{cost.wall:>9.3f}{cost.cpu:>9.3f}"
            f"{cost.images_per_second:>10.2f}{ahead['wall']:>22.2f}{ahead['cpu']:>7.2f}"
            f"{f'{same:.1e}' if same is not None else '':>16}"
        ).rstrip()


def verdict(results: list[Result], missing: Mapping[str, str]) -> Iterator[str]:
    """Whether what is required was reached, and who is not in the comparison and why, line by line."""
    yield "Required: ahead of every library, in wall and in CPU time, everywhere."
    for result in results:
        for peer in result.comparable:
            least = min(min(result.ahead(peer, batch).values()) for batch in result.batches())
            yield f"  {result.network:<10}{peer:<14}{least:>7.2f} times  {'ok' if least > 1 else 'MISSED'}"
        for peer in result.agreement.keys() - result.comparable - result.failed.keys():
            yield f"  {result.network:<10}{peer:<14}NOT COMPARABLE: its maps are not ours, or all dark"
        for peer, reason in result.failed.items():
            yield f"  {result.network:<10}{peer:<14}DOES NOT RUN HERE: {reason}"
    for peer, reason in missing.items():
        yield f"  {peer:<24}DOES NOT INSTALL HERE: {reason}"


def document(results: list[Result], missing: Mapping[str, str], **about: Any) -> dict[str, Any]:
    """Everything as plain data, network -> batch -> library; `times_peer` are ratios within this run."""
    return {
        "times_peer": {
            one.network: {
                str(n): {peer: one.ahead(peer, n) for peer in one.comparable} for n in one.batches()
            }
            for one in results
        },
        "images_per_s": {one.network: by_batch(one, "images_per_second") for one in results},
        "cpu_s": {one.network: by_batch(one, "cpu") for one in results},
        "repeats": {one.network: by_batch(one, "repeats") for one in results},
        "agreement": {one.network: one.agreement for one in results},
        "not_comparable": {
            one.network: sorted(one.agreement.keys() - one.comparable - one.failed.keys()) for one in results
        },
        "failed": {one.network: one.failed for one in results},
        "not_installed": dict(missing),
        "classes": CLASSES,
        "passed": all(one.passed() for one in results),
        **about,
    }


def by_batch(result: Result, what: str) -> dict[str, dict[str, float]]:
    """Batch size -> library -> a figure of its cost."""
    found: dict[str, dict[str, float]] = {}
    for (name, batch), cost in result.costs.items():
        found.setdefault(str(batch), {})[name] = getattr(cost, what)
    return found


def main(*, quick: bool, as_json: bool) -> int:
    """Make the environment where there is none, measure one network after the other; 1: ours is behind."""
    environment = Environment.of_user(tuple(PEERS))
    missing = environment.make()
    commands = {OURS: [sys.executable, "-P", str(HERE / "peer_ours.py"), OURS]} | {
        name: [str(environment.python), "-P", str(HERE / program), name]
        for name, program in PEERS.items()
        if name not in missing
    }
    begun, about, results = time.perf_counter(), machine(), []
    made = versions("tensorflow", "keras", "numpy") | environment.versions("torch", *PEERS)
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {number}" for name, number in made.items()))
    say(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
    for network in NETWORKS:
        results.append(measure(network, commands, BATCHES[:1] if quick else BATCHES, 2 if quick else ROUNDS))
        say("\n" + "\n".join(table(results[-1])))
    took_s = time.perf_counter() - begun
    say("\n" + "\n".join(verdict(results, missing)) + f"\nTook {took_s:.0f} s.")
    if as_json:
        found = document(results, missing, took_s=took_s, machine=about, versions=made)
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if all(result.passed() for result in results) else 1
