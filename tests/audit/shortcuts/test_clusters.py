from dataclasses import replace

import numpy as np
import pytest

from devtools.planted.samples import GRID, anywhere, sample_of
from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.audit.shortcuts.clusters import MAX_CLUSTERS, MIN_IMAGES, draw_map, find_clusters


def two_gazes(class_id: int = 0) -> ClassSample:
    """40 images that look at the top left, and 20 at the bottom right."""
    rng = np.random.default_rng(class_id)
    places = np.repeat(np.array([[0.2, 0.2], [0.8, 0.8]], np.float32), [40, 20], axis=0)
    return sample_of(class_id, (places + rng.normal(0, 0.02, (60, 2))).astype(np.float32))


def test_two_gazes_are_two_clusters_the_larger_first() -> None:
    first, second = find_clusters([two_gazes()])
    assert sorted(first.members.tolist()) == [*range(40)]
    assert sorted(second.members.tolist()) == [*range(40, 60)]
    assert first.share == pytest.approx(2 / 3)
    assert first.heat.shape == GRID
    assert first.heat[:6, :6].sum() > 0.9


def test_features_tell_gazes_at_one_place_apart() -> None:
    places = np.full((60, 2), 0.5, np.float32)
    features = np.random.default_rng(0).normal(0, 0.05, (60, 300))
    features[:30, 0] += 5
    features[30:, 1] += 5
    sample = sample_of(0, places, features=features.astype(np.float16))
    clusters = find_clusters([sample])
    assert sorted(sorted(cluster.members.tolist()) for cluster in clusters) == [
        [*range(30)],
        [*range(30, 60)],
    ]


def test_more_places_than_clusters_are_as_many_clusters_as_there_may_be() -> None:
    centers = np.stack(np.meshgrid(np.linspace(0.1, 0.9, 4), np.linspace(0.1, 0.9, 3)), -1).reshape(-1, 2)
    sample = sample_of(0, np.repeat(centers.astype(np.float32), 15, axis=0))  # twelve places, 15 images each
    clusters = find_clusters([sample])
    assert len(clusters) == MAX_CLUSTERS
    assert {len(cluster.members) % 15 for cluster in clusters} == {0}, "no place is torn apart"


def test_few_images_are_one_cluster() -> None:
    (cluster,) = find_clusters([sample_of(3, anywhere(MIN_IMAGES - 1, 0))])
    assert (cluster.class_id, cluster.share, len(cluster.members)) == (3, 1, MIN_IMAGES - 1)


def test_clusters_and_map_are_the_same_each_time_and_the_map_keeps_gazes_apart() -> None:
    samples = [two_gazes(0), two_gazes(1)]
    clusters = find_clusters(samples)
    again = find_clusters(samples)
    assert [one.members.tolist() for one in clusters] == [one.members.tolist() for one in again]
    drawn, drawn_again = draw_map(samples, clusters), draw_map(samples, again)
    assert drawn.xy.tolist() == drawn_again.xy.tolist()
    assert (drawn.xy.min(), drawn.xy.max()) == (0, 1)
    assert drawn.records.tolist() == [*range(60), *range(1000, 1060)]
    for cluster in np.unique(drawn.clusters):
        members = np.flatnonzero(drawn.clusters == cluster)
        assert len({(member // 60, member % 60 < 40) for member in members.tolist()}) == 1
    assert abs(drawn.xy[:40].mean(0) - drawn.xy[40:60].mean(0)).max() > 0.5


def test_images_without_heat_and_no_samples_at_all() -> None:
    cold = replace(two_gazes(), heat=np.zeros((60, *GRID), np.float32))
    assert sum(len(cluster.members) for cluster in find_clusters([cold])) == 60
    assert find_clusters([]) == []
    assert draw_map([], []).xy.shape == (0, 2)
