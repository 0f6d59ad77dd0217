"""What a class's predictions look at, in clusters: spectral clustering of their heat, as SpRAy does it.

SpRAy (Lapuschkin et al. 2019, arXiv:1902.10178) clusters the heatmaps of a class by the eigenvectors of a
graph of nearest neighbours, and takes as many clusters as the gap between the eigenvalues says.

Each image is a vector: the roots of the shares of heat of its cells, so that the distance of two images is
that of Hellinger between their distributions of heat. Where features of the target layer are known, which are
averaged with the heat as weights, they are appended with the same length. Two images are joined if one is
among the `NEIGHBOURS` nearest of the other. Of the first `MAX_CLUSTERS` + 1 eigenvalues of the graph's
normalized Laplacian, the widest gap between two neighbours ends the clusters; if all are zero, the graph has
more parts than `MAX_CLUSTERS`, and so many clusters are made. k-means with a fixed seed finds them in the
eigenvectors.

Departures from SpRAy: heat is compared as a distribution, not as pixels; the graph is made of a sample of
each class, and every other image belongs to the cluster of its nearest neighbour there.

This is the only module that imports scikit-learn, where it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.extras import required

MAX_CLUSTERS = 8
NEIGHBOURS = 10
MIN_IMAGES = 24  # of a class that is clustered; fewer are one cluster
GRAPH_IMAGES = 256  # of a class in the graph: the eigenvalues of a larger one take seconds
MAX_FEATURES = 64  # channels; more are projected to as many by chance
ROUNDING = 1e-6  # of eigenvalues: smaller gaps are none, as in a graph of more than `MAX_CLUSTERS` parts
TINY = 1e-9  # a shorter side or vector counts as zero
USER = "Clustering what a network looks at"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cluster:
    """Images of a class that look at the same.

    Attributes:
        class_id: The class.
        members: Their numbers in the sample of the class; those nearest to the middle come first.
        share: Of the sample.
        heat: (rows, columns), the mean of their heat; sums to 1.
    """

    class_id: int
    members: NDArray[np.intp]
    share: float
    heat: Floats


@dataclass(frozen=True)
class GazeMap:
    """Where each image of the samples lies on a map: near each other, what looks at the same.

    Attributes:
        rows: (n,) the column `row`.
        indices: (n,) the column `index`.
        records: (n,) numbers among all records of the dataset.
        xy: (n, 2), from 0 to 1.
        clusters: (n,) the number of each image's cluster.
    """

    rows: NDArray[np.int64]
    indices: NDArray[np.int64]
    records: NDArray[np.int64]
    xy: Floats
    clusters: NDArray[np.int64]


def find_clusters(samples: Sequence[ClassSample], seed: int = 0) -> list[Cluster]:
    """Cluster the images of each class.

    Args:
        samples: Images that are predicted as each class.
        seed: Of the choice of images, and of k-means.

    Returns:
        The clusters of each class, the largest first; classes in the order of the samples.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    clusters: list[Cluster] = []
    for sample in samples:
        vectors = _vectors(sample)
        labels = _labels(vectors, seed)
        sizes = np.bincount(labels)
        for label in np.argsort(-sizes, kind="stable").tolist():
            members = np.flatnonzero(labels == label)
            apart = ((vectors[members] - vectors[members].mean(0)) ** 2).sum(1)
            members = members[np.argsort(apart, kind="stable")]
            share = len(members) / len(sample)
            clusters.append(Cluster(sample.class_id, members, share, sample.heat[members].mean(0)))
    return clusters


def _vectors(sample: ClassSample) -> Floats:
    """(n, dimensions): see the docstring of this module."""
    heat = np.sqrt(np.maximum(sample.heat.reshape(len(sample), -1), 0))
    if sample.features is None:
        return np.asarray(heat, np.float32)
    features = np.nan_to_num(sample.features.astype(np.float32))
    if features.shape[1] > MAX_FEATURES:
        features = features @ np.random.default_rng(0).normal(size=(features.shape[1], MAX_FEATURES)).astype(
            np.float32
        )
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    return np.concatenate([heat, features], axis=1, dtype=np.float32)


def _labels(vectors: Floats, seed: int) -> NDArray[np.intp]:
    """The number of each vector's cluster, from 0."""
    count = len(vectors)
    if count < MIN_IMAGES:
        return np.zeros(count, np.intp)
    with required(USER, "audit"):
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:GRAPH_IMAGES])
    part = vectors[chosen]
    with threadpool_limits(1):  # on matrices this small, threads take longer to meet than to compute
        distances = _distances(part, part)
        np.fill_diagonal(distances, np.inf)
        joined = np.zeros(distances.shape)
        near = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]
        np.put_along_axis(joined, near, 1, 1)
        joined = np.maximum(joined, joined.T)
        degrees = joined.sum(1)
        laplacian = np.eye(len(part)) - joined / np.sqrt(degrees[:, None] * degrees)
        values, eigenvectors = np.linalg.eigh(laplacian)
        gaps = np.diff(values[: MAX_CLUSTERS + 1])
        clusters = int(gaps.argmax()) + 1 if gaps.max() > ROUNDING else MAX_CLUSTERS
        if clusters == 1:
            return np.zeros(count, np.intp)
        embedded = eigenvectors[:, :clusters] / np.sqrt(degrees)[:, None]
        found = KMeans(clusters, n_init=4, random_state=seed).fit_predict(embedded)
        labels = found[_distances(vectors, part).argmin(1)]
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.intp)


def _distances(vectors: Floats, others: Floats) -> NDArray[np.float64]:
    """The squared distance of each vector to each of the others."""
    lengths, of_others = (vectors**2).sum(1), (others**2).sum(1)
    return np.asarray(lengths[:, None] + of_others - 2 * (vectors @ others.T), np.float64)


def draw_map(samples: Sequence[ClassSample], clusters: Sequence[Cluster]) -> GazeMap:
    """Lay the images of all samples on a map: the first two principal components of what they look at.

    Args:
        samples: Images that are predicted as each class.
        clusters: From `find_clusters` of these samples.

    Returns:
        The map.
    """
    numbers = {sample.class_id: np.zeros(len(sample), np.int32) for sample in samples}
    for number, cluster in enumerate(clusters):
        numbers[cluster.class_id][cluster.members] = number
    xy = np.zeros((0, 2), np.float32)
    if samples:
        middle, axes = _principal_axes(samples)
        xy = np.concatenate([(_vectors(sample) - middle) @ axes for sample in samples])
        least, most = xy.min(0), xy.max(0)
        xy = (xy - least) / np.maximum(most - least, TINY)
    return GazeMap(
        _joined([sample.rows for sample in samples]),
        _joined([sample.indices for sample in samples]),
        _joined([sample.records for sample in samples]),
        xy,
        _joined([numbers[sample.class_id] for sample in samples]),
    )


def _principal_axes(samples: Sequence[ClassSample]) -> tuple[Floats, Floats]:
    """The mean of all vectors, and the two directions in which they vary most (dimensions, 2)."""
    count, total, products = 0, np.zeros(1), np.zeros((1, 1))
    for sample in samples:
        vectors = _vectors(sample)
        count += len(vectors)
        total = total + vectors.sum(0, dtype=np.float64)
        products = products + vectors.T @ vectors
    middle = total / max(count, 1)
    axes = np.linalg.eigh(products / max(count, 1) - np.outer(middle, middle))[1][:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(2)])  # of two opposite ones, always the same
    return np.asarray(middle, np.float32), np.asarray(axes, np.float32)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
