"""Clustering against scikit-learn and against partitions known in advance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from filterfold.errors import ConfigError, ModelError
from filterfold.online.clustering import Clustering, cluster, directions, merging_inertias, moved
from filterfold.utils.io import read_safetensors


def bundles(n: int, d: int, k: int, *, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator)
    rows = centres[torch.arange(n) % k] + noise * torch.randn(n, d, generator=generator)
    return rows * torch.rand(n, 1, generator=generator).add(0.1)


def oracle_inertia(x: torch.Tensor, labels: torch.Tensor) -> float:
    rows = x.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    groups = [rows[labels.numpy() == label] for label in range(int(labels.max()) + 1)]
    return float(sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups))


@pytest.mark.parametrize(("n", "d", "k"), [(64, 27, 32), (128, 144, 20), (100, 576, 5), (96, 40, 48)])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_inertia_within_one_percent_of_scikit_learn(n: int, d: int, k: int, noise: float) -> None:
    x = bundles(n, d, k, noise=noise)
    found = cluster(x, clusters=k)
    theirs = KMeans(k, n_init=4, random_state=0).fit((x / x.norm(dim=1, keepdim=True)).numpy()).inertia_
    assert found.inertia <= 1.01 * theirs
    assert found.inertia == pytest.approx(oracle_inertia(x, found.labels), rel=1e-4)
    assert found.count == k


def test_inertia_on_trained_filters(shared) -> None:
    _, tensors = read_safetensors(shared / "weights" / "resnet20-cifar10.safetensors")
    layers = [t.flatten(1) for name, t in tensors.items() if t.ndim == 4]
    assert len(layers) >= 19
    for x in layers:
        k = len(x) // 2
        theirs = KMeans(k, n_init=1, random_state=0).fit((x / x.norm(dim=1, keepdim=True)).numpy()).inertia_
        assert cluster(x, clusters=k).inertia <= 1.01 * theirs


def test_euclidean_inertia_within_one_percent_of_scikit_learn() -> None:
    x = bundles(120, 30, 12) + 5  # an offset, to which Euclidean k-means is indifferent
    theirs = KMeans(12, n_init=4, random_state=0).fit(x.numpy()).inertia_
    assert cluster(x, clusters=12, method="euclidean").inertia <= 1.01 * theirs


@pytest.mark.parametrize("seed", range(5))
def test_reaches_the_best_partition_of_a_tiny_set(seed: int) -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)

    def objective(labels: tuple[int, ...]) -> float:
        return sum(float(unit[[i for i in range(7) if labels[i] == c]].sum(dim=0).norm()) for c in range(3))

    best = max(objective(labels) for labels in itertools.product(range(3), repeat=7) if len(set(labels)) == 3)
    found = cluster(x, clusters=3, restarts=20)
    assert objective(tuple(found.labels.tolist())) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_positive_multiples_share_a_cluster(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(9, 50, generator=generator, dtype=dtype)
    which = torch.cat([torch.arange(9), torch.randint(9, (23,), generator=generator)])
    x = base[which] * torch.rand(32, 1, generator=generator, dtype=dtype).add(0.01)
    found = cluster(x, clusters=9, restarts=1, seed=seed)
    assert found.labels.tolist() == which.tolist()  # the first nine rows come in order, so numbering is canonical
    assert found.inertia == pytest.approx(0, abs=1e-5)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("method", ["spherical", "euclidean", "agglomerative"])
def test_canonical_and_complete(method) -> None:
    x = bundles(40, 20, 10, noise=1.0)
    found = cluster(x, clusters=13, method=method)
    first = [found.labels.tolist().index(label) for label in range(13)]
    assert first == sorted(first)
    assert found.count == 13


def test_same_seed_same_result_and_global_generator_untouched() -> None:
    x = torch.randn(60, 30, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    one, two, three = (cluster(x, clusters=20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.labels, three.labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_input_is_not_modified_and_half_precision_is_read() -> None:
    x = bundles(30, 16, 6)
    kept = x.clone()
    cluster(x, clusters=6, method="euclidean")
    cluster(x, clusters=6)
    assert torch.equal(x, kept)
    assert torch.equal(cluster(x.bfloat16(), clusters=6).labels, cluster(x.bfloat16().float(), clusters=6).labels)


def test_rows_without_direction() -> None:
    x = torch.eye(4)
    x[1] = 0
    assert cluster(x, clusters=2).count == 2
    assert cluster(x, clusters=3).labels.tolist() == [0, 0, 1, 2]
    assert cluster(x, clusters=4).labels.tolist() == [0, 1, 2, 3]
    assert cluster(torch.zeros(5, 3), clusters=2).labels.tolist() == [0] * 5
    tiny = torch.tensor([[1e-30, 0.0], [0.0, 1e-30], [1.0, 0.0]])
    assert cluster(tiny, clusters=2).labels.tolist() == [0, 1, 0]


def test_more_clusters_than_rows_or_than_directions() -> None:
    assert cluster(torch.eye(3), clusters=7).labels.tolist() == [0, 1, 2]
    assert cluster(torch.ones(6, 2), clusters=3).count == 3  # what was asked for, though there is one direction only
    assert cluster(torch.eye(3), clusters=1).labels.tolist() == [0, 0, 0]


def test_warm_start_stays_where_it_is_best() -> None:
    x = bundles(80, 40, 16)
    first = cluster(x, clusters=16)
    again = cluster(x, clusters=16, start=first.labels)
    assert torch.equal(first.labels, again.labels)
    few = cluster(x, clusters=16, start=[0] * 80)
    assert few.count == 16
    with pytest.raises(ConfigError, match="start has 16 clusters, more than the 10 asked for"):
        cluster(x, clusters=10, start=first.labels)


def test_threshold_is_a_promise_about_every_pair() -> None:
    x = bundles(60, 10, 12, noise=0.5)
    unit = directions(x)
    found = cluster(x, threshold=0.8)
    same = found.labels[:, None] == found.labels[None]
    assert float((unit @ unit.T)[same].min()) >= 0.8 - 1e-5
    assert 12 <= found.count < 60
    assert cluster(x, threshold=1.0).count == 60
    assert cluster(x[:1], threshold=0.5).count == 1


def test_moved_ignores_renumbering() -> None:
    assert moved([0, 1, 2, 0], [2, 0, 1, 2]) == 0
    assert moved([0, 0, 0, 1], [0, 0, 1, 1]) == 1
    assert moved([], []) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say either how many clusters or the similarity threshold"),
        ({"clusters": 2, "threshold": 0.5}, "say either how many clusters or the similarity threshold"),
        ({"clusters": 0}, "clusters=0: at least one"),
        ({"clusters": 2, "method": "magic"}, "unknown clustering method 'magic'"),
        ({"threshold": 0.5, "method": "spherical"}, "needs method='agglomerative'"),
        ({"threshold": 1.5}, r"threshold=1.5: a cosine similarity lies in \[-1, 1\]"),
        ({"clusters": 2, "start": [0, 1]}, r"start has shape \(2,\) for 4 rows"),
    ],
)
def test_bad_options(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(torch.eye(4), **options)


def test_bad_matrices() -> None:
    for x in (torch.zeros(0, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="needs a floating matrix"):
            cluster(x, clusters=1)
    with pytest.raises(ModelError, match="diverged"):
        cluster(torch.full((3, 3), math.nan), clusters=1)


def test_result_shapes() -> None:
    found = cluster(bundles(20, 7, 4), clusters=4)
    assert isinstance(found, Clustering)
    assert found.labels.dtype == torch.int64
    assert found.centroids.shape == (4, 7)
    assert float(found.centroids.norm(dim=1).max()) <= 1 + 1e-6


def test_weights_decide_where_clusters_are_spent() -> None:
    """Brute force over all partitions into three of seven weighted rows."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 5.0, 0.2, 3.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    rows = x / x.norm(dim=1, keepdim=True) * weights[:, None]

    def objective(labels: tuple[int, ...]) -> float:
        return sum(float(rows[[i for i in range(7) if labels[i] == c]].sum(dim=0).norm()) for c in range(3))

    best = max(objective(labels) for labels in itertools.product(range(3), repeat=7) if len(set(labels)) == 3)
    found = cluster(x, clusters=3, restarts=20, weights=weights)
    assert objective(tuple(found.labels.tolist())) == pytest.approx(best, rel=1e-9)
    with pytest.raises(ConfigError, match="weights must be 7 finite numbers that are not negative"):
        cluster(x, clusters=3, weights=-weights)
    with pytest.raises(ConfigError, match="weights are for spherical k-means, not 'euclidean'"):
        cluster(x, clusters=3, weights=weights, method="euclidean")


def test_start_competes_with_new_starts_if_asked() -> None:
    x = bundles(60, 20, 12)
    poor = [0] * 49 + list(range(1, 12))
    alone, both = cluster(x, clusters=12, start=poor), cluster(x, clusters=12, start=poor, restarts=8)
    assert both.inertia <= alone.inertia
    assert both.inertia <= 1.001 * cluster(x, clusters=12, restarts=8).inertia


@pytest.mark.parametrize("n", [1, 2, 30])
def test_merging_inertias_against_scikit_learn(n: int) -> None:
    from sklearn.cluster import AgglomerativeClustering

    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    found = merging_inertias(x)
    unit = x / x.norm(dim=1, keepdim=True)
    for k in range(1, n + 1):
        labels = torch.zeros(1, dtype=torch.int64)
        if n > 1:
            labels = torch.as_tensor(AgglomerativeClustering(k, linkage="ward").fit_predict(unit.numpy()))
        groups = [unit[labels == label] for label in range(k)]
        inertia = sum(float((rows - rows.mean(dim=0)).square().sum()) for rows in groups)
        assert found[k - 1].item() == pytest.approx(inertia, abs=1e-9)
        assert found[k - 1] <= 1.2 * cluster(x, clusters=k).inertia + 1e-9
    assert bool((found.diff() <= 1e-12).all())
