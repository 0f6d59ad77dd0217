"""Permutation tests of how two groups of heatmaps differ, and the correction for many of them.

Sources: R. A. Fisher, The Design of Experiments, 1935 (permutations); J. Besag and P. Clifford, Sequential
Monte Carlo p-values, Biometrika 78, 1991 (when to stop); Y. Benjamini and Y. Hochberg, Controlling the false
discovery rate, J. R. Stat. Soc. B 57, 1995.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENOUGH_EXCEEDANCES = 20  # a p-value that rests on so many is not made more exact
FIRST_PERMUTATIONS, MORE_PERMUTATIONS = 250, 2000  # that are computed at once
ROUNDING = 1e-6  # relative: a permutation that gives the same groups must count as reaching the statistic
TINY = 1e-12


@dataclass(frozen=True)
class Difference:
    """How the means of two groups differ.

    Attributes:
        distance: Half of the sum of the absolute differences of the two mean vectors. Of heatmaps that each
            sum to 1 it is the share of the heat that would have to move, from 0 to 1.
        by_chance: The mean distance of the permutations that were made: what equal groups would have.
        p: The probability that the permutation of equal groups gives at least this distance.
        effect: The Euclidean length of the difference of the means, in units of the root mean square distance
            of a single vector from the mean of its group (of pairs: of a difference from their mean).
            For single numbers it is Cohen's d. It does not grow with the number of vectors.
    """

    distance: float
    by_chance: float
    p: float
    effect: float


def permutation_test(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    *,
    paired: bool,
    seed: Sequence[int],
    max_permutations: int,
) -> Difference:
    """Test whether two groups of vectors have the same distribution, by the distance of their means.

    Of pairs, the two members are exchanged at random; otherwise all vectors are dealt to two groups of the
    same sizes. Permutations are made until `ENOUGH_EXCEEDANCES` reach the distance of the data: the p-value
    is then their share. If there are never so many, it is (reached + 1) / (made + 1).

    Args:
        a: (n, cells).
        b: (m, cells); of pairs, n in the same order.
        paired: Whether a[i] and b[i] are of the same image.
        seed: Of the permutations. The same seed gives the same result.
        max_permutations: The most that are made. The least possible p-value is 1 / (max_permutations + 1).

    Returns:
        The difference.
    """
    rng = np.random.default_rng(seed)
    pooled = a - b if paired else np.concatenate([a, b])
    pooled = pooled.astype(np.float32)
    center = np.zeros_like(pooled[0]) if paired else pooled.mean(axis=0)
    vectors = pooled - center  # smaller numbers: less is lost in float32
    difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    distance = float(np.abs(difference).sum() / 2)
    reached, made, total = 0, 0, 0.0
    while reached < ENOUGH_EXCEEDANCES and made < max_permutations:
        count = min(MORE_PERMUTATIONS if made else FIRST_PERMUTATIONS, max_permutations - made)
        weights = _swaps(rng, count, len(a)) if paired else _deals(rng, count, len(a), len(b))
        distances = np.abs(weights @ vectors).sum(axis=1) / 2
        total += float(distances.sum())
        hits = np.cumsum(distances >= distance * (1 - ROUNDING) - TINY)
        if reached + hits[-1] >= ENOUGH_EXCEEDANCES:
            used = int(np.searchsorted(hits, ENOUGH_EXCEEDANCES - reached)) + 1
            p = ENOUGH_EXCEEDANCES / (made + used)
            return Difference(distance, total / (made + count), p, _effect(a, b, difference, paired=paired))
        reached, made = reached + int(hits[-1]), made + count
    p = (reached + 1) / (made + 1)
    return Difference(distance, total / max(made, 1), p, _effect(a, b, difference, paired=paired))


def _swaps(rng: np.random.Generator, count: int, pairs: int) -> NDArray[np.float32]:
    """Weights of the differences of pairs: (count, pairs), 1 or -1 over the number of pairs."""
    bits = np.unpackbits(rng.integers(0, 256, (count, -(-pairs // 8)), dtype=np.uint8), axis=1)[:, :pairs]
    signs: NDArray[np.float32] = bits.astype(np.float32) * np.float32(2 / pairs) - np.float32(1 / pairs)
    return signs


def _deals(rng: np.random.Generator, count: int, first: int, second: int) -> NDArray[np.float32]:
    """Weights of all vectors: (count, first + second), 1 / first of those in the first group."""
    weights = np.full((count, first + second), -1 / second, np.float32)
    chosen = np.argpartition(rng.random(weights.shape, dtype=np.float32), first - 1, axis=1)[:, :first]
    np.put_along_axis(weights, chosen, np.float32(1 / first), axis=1)
    return weights


def _effect(
    a: NDArray[np.float32], b: NDArray[np.float32], difference: NDArray[np.float64], *, paired: bool
) -> float:
    groups = [a.astype(np.float64) - b] if paired else [a.astype(np.float64), b.astype(np.float64)]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(((group - group.mean(axis=0)) ** 2).sum()) for group in groups)
    length = float(np.sqrt((difference**2).sum()))
    if length < TINY:
        return 0.0
    return length / max(float(np.sqrt(squares / max(freedom, 1))), TINY)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number: those of at most q have a false discovery rate of at most q.

    Args:
        p_values: Of all tests that were made.

    Returns:
        The adjusted p-values, in the same order.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return [float(value) for value in adjusted]


def binomial_log_tail(
    least: NDArray[np.int64], count: int, chances: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute how unlikely so many hits are.

    Args:
        least: Numbers of hits.
        count: Tries.
        chances: Of a hit in each try, between 0 and 1; of the shape of `least`.

    Returns:
        The logarithm of the probability of at least so many hits.
    """
    hits = np.arange(count + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    ways = factorials[count] - factorials[hits] - factorials[count - hits]
    chance = np.clip(chances, TINY, 1 - TINY)[..., None]
    logs = ways + hits * np.log(chance) + (count - hits) * np.log1p(-chance)
    logs = np.where(hits >= least[..., None], logs, -np.inf)
    greatest = logs.max(-1, keepdims=True)
    tail = greatest[..., 0] + np.log(np.exp(logs - greatest).sum(-1))
    return np.asarray(np.minimum(tail, 0), np.float64)
