"""Permutation tests and their correction, against plain computations and known distributions."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.audit.significance import benjamini_hochberg, permutation_test


def heat(seed: int, count: int, corner: float = 0.0) -> NDArray[np.float32]:
    """Maps of nine cells that sum to 1, of which `corner` is in the first cell and the rest anywhere."""
    maps = np.random.default_rng(seed).dirichlet(np.ones(9), count).astype(np.float32) * (1 - corner)
    maps[:, 0] += corner
    return maps


def test_the_distance_is_the_share_of_the_heat_that_moved() -> None:
    left = np.eye(4, dtype=np.float32)[[0] * 12]
    half = np.full((12, 4), [0.5, 0, 0, 0.5], np.float32)
    found = permutation_test(left, half, paired=False, seed=[1], max_permutations=500)
    assert found.distance == pytest.approx(0.5)
    assert permutation_test(left, left, paired=True, seed=[1], max_permutations=500).distance == 0


@pytest.mark.parametrize("paired", [True, False])
def test_the_p_value_is_that_of_all_permutations(paired: bool) -> None:
    a, b = heat(1, 8), heat(2, 8, corner=0.08)

    def distance(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
        return sum(abs(float(x)) for x in first.mean(axis=0) - second.mean(axis=0)) / 2

    distances = []
    if paired:
        for swapped in itertools.product([False, True], repeat=8):
            swap = np.array(swapped)[:, None]
            distances.append(distance(np.where(swap, b, a), np.where(swap, a, b)))
    else:
        pooled = np.concatenate([a, b])
        for chosen in itertools.combinations(range(16), 8):
            is_first = np.isin(np.arange(16), chosen)
            distances.append(distance(pooled[is_first], pooled[~is_first]))
    exact = float(np.mean(np.array(distances) >= distance(a, b) - 1e-7))
    found = permutation_test(a, b, paired=paired, seed=[5], max_permutations=20_000)
    assert found.distance == pytest.approx(distance(a, b))
    assert found.p == pytest.approx(exact, rel=0.8, abs=0.01)  # it rests on 20 permutations that reached it
    assert found.by_chance == pytest.approx(np.mean(distances), rel=0.1)


@pytest.mark.parametrize("paired", [True, False])
def test_p_values_of_equal_groups_are_evenly_distributed(paired: bool) -> None:
    values = [
        permutation_test(
            heat(2 * seed, 20), heat(2 * seed + 1, 20), paired=paired, seed=[seed], max_permutations=400
        ).p
        for seed in range(200)
    ]
    assert np.mean(np.array(values) <= 0.05) <= 0.09  # three standard deviations above 5 %
    assert 0.4 < np.median(values) < 0.65


def test_identical_pairs_are_not_different() -> None:
    found = permutation_test(heat(1, 30), heat(1, 30), paired=True, seed=[1], max_permutations=999)
    assert (found.distance, found.p, found.effect) == (0, 1, 0)


def test_a_moved_corner_has_the_least_p_value_that_can_be() -> None:
    found = permutation_test(
        heat(1, 40), heat(2, 40, corner=0.5), paired=False, seed=[1], max_permutations=999
    )
    assert found.p == pytest.approx(1 / 1000)
    assert found.distance == pytest.approx(0.45, abs=0.05)
    assert found.effect > 1
    assert found.by_chance < 0.1


def test_the_effect_of_single_numbers_is_cohens_d() -> None:
    a, b = (np.array(values, np.float32)[:, None] for values in ([1, 2, 3, 4], [3, 5, 4, 6]))
    pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    found = permutation_test(a, b, paired=False, seed=[1], max_permutations=10)
    assert found.effect == pytest.approx(2 / pooled)
    differences = (b - a).ravel()
    found = permutation_test(a, b, paired=True, seed=[1], max_permutations=10)
    assert found.effect == pytest.approx(2 / differences.std(ddof=1))


def test_the_same_seed_gives_the_same_result() -> None:
    results = {
        permutation_test(heat(1, 15), heat(2, 15), paired=True, seed=[seed], max_permutations=100)
        for seed in (3, 3, 4)
    }
    assert len(results) == 2


def test_adjusted_p_values_are_those_of_the_procedure() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    assert benjamini_hochberg(p) == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.9])
    assert benjamini_hochberg([]) == []
    assert benjamini_hochberg([1.0, 1.0]) == [1, 1]
