"""Variants of a computation that take turns, and the medians of what each of them took."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Variant:
    """One way to compute, and how often it is measured."""

    name: str
    batch: int  # images a call
    repeats: int
    run: Callable[[], object]  # returns when the result is on the host
    warm: bool = False  # has run before, and need not once more before it is measured


@dataclass(frozen=True)
class Cost:
    """The medians of one variant's calls."""

    variant: str
    batch: int
    repeats: int
    wall: float  # seconds a call
    cpu: float  # seconds a call, of all threads of this process

    @property
    def images_per_second(self) -> float:
        """Images per second of wall time."""
        return self.batch / self.wall


def interleave(variants: list[Variant]) -> tuple[Cost, ...]:
    """Measure all variants in rounds, the rarer ones spread evenly, every other round backwards."""
    for variant in variants:
        if not variant.warm:
            variant.run()  # traces, and fills the caches
    rounds = max(variant.repeats for variant in variants)
    measured: dict[int, list[tuple[float, float]]] = {index: [] for index in range(len(variants))}
    for turn in range(rounds):
        order = list(enumerate(variants))
        for index, variant in order if turn % 2 == 0 else reversed(order):
            if len(measured[index]) * rounds <= turn * variant.repeats:
                measured[index].append(clock(variant.run))
    return tuple(_cost(variant, measured[index]) for index, variant in enumerate(variants))


def clock(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _cost(variant: Variant, measured: list[tuple[float, float]]) -> Cost:
    wall, cpu = (median(column) for column in zip(*measured, strict=True))
    return Cost(variant.name, variant.batch, len(measured), wall, cpu)
