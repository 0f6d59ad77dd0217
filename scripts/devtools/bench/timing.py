"""Variants of a computation that take turns, and the medians of what each of them took."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

Seconds = tuple[float, float]  # wall, and CPU of all threads


def clock(run: Callable[[], object]) -> Seconds:
    """Time one call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


@dataclass(frozen=True)
class Variant:
    """One way to compute, and how often it is measured."""

    name: str
    batch: int  # images a call
    repeats: int
    run: Callable[[], Any]  # returns when the result is on the host
    warm: bool = False  # has run before, and need not once more before it is measured
    clock: Callable[[Callable[[], Any]], Seconds] = clock


@dataclass(frozen=True)
class Cost:
    """The medians of one variant's calls."""

    variant: str
    batch: int
    repeats: int
    wall: float  # seconds a call
    cpu: float  # seconds a call, of all threads


def interleave(variants: list[Variant]) -> tuple[Cost, ...]:
    """Measure all variants in rounds, the rarer ones spread evenly, every other round backwards."""
    for variant in variants:
        if not variant.warm:
            variant.run()  # traces, and fills the caches
    rounds = max(variant.repeats for variant in variants)
    measured: list[list[Seconds]] = [[] for _ in variants]
    for turn in range(rounds):
        order = list(zip(variants, measured, strict=True))
        for variant, calls in order if turn % 2 == 0 else reversed(order):
            if len(calls) * rounds <= turn * variant.repeats:
                calls.append(variant.clock(variant.run))
    return tuple(
        Cost(
            variant.name, variant.batch, len(calls), *(median(column) for column in zip(*calls, strict=True))
        )
        for variant, calls in zip(variants, measured, strict=True)
    )
