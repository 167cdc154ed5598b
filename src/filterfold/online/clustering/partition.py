"""Clustering of filters by direction: k-means, by threshold, hierarchical; and what merging costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError, ModelError
from .kmeans import kmeans


def directions(x: Tensor) -> Tensor:
    """The rows of `x`, shape `(n, d)`, scaled to length 1; zero rows stay zero.

    >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6..., 0.8...], [0.0, 0.0]]
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = x / largest.where(largest > 0, 1)  # first, so that tiny rows don't underflow when squared
    length = scaled.norm(dim=1, keepdim=True)
    return torch.div(scaled, length.where(length > 0, 1))


def merging_inertias(x: Tensor) -> Tensor:
    """What is lost by merging the rows of `x`, shape `(n, d)`, two by two: inertia with 1, 2, … n clusters.

    Ward, "Hierarchical grouping to optimize an objective function" (1963), on directions: each merge is the one that
    raises Σ ‖direction - cluster mean‖² least. The whole curve costs about as much as one k-means, whose inertia at
    each number it exceeds by some percent; it never rises with the number of clusters.

    **Returns:** shape `(n,)`, float64 on the CPU; entry k - 1 is for k clusters.

    ```python
    >>> merging_inertias(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).round(decimals=3).tolist()
    [1.333, 0.0, 0.0]

    ```
    """
    from scipy.cluster.hierarchy import ward

    if len(x) == 1:
        return torch.zeros(1, dtype=torch.float64)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows = directions(x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32))
        gram = (rows @ rows.T).double().cpu()
    square = gram.diagonal()
    distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0).sqrt()
    above = torch.triu_indices(len(x), len(x), 1)
    heights = torch.from_numpy(ward(distance[above[0], above[1]].numpy())[:, 2].copy())
    lost = (heights.square() / 2).cumsum(0)  # after 1, 2, … n - 1 merges; a height is √2 × root of what it adds
    return torch.cat((lost.flip(0), lost.new_zeros(1)))


Method = Literal["spherical", "euclidean", "agglomerative"]


METHODS: tuple[Method, ...] = ("spherical", "euclidean", "agglomerative")


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """A partition of n rows.

    **Arguments:**

    - `labels`: shape `(n,)`, int64: the cluster of every row, numbered by first member, so that
      equal partitions have equal labels.
    - `centroids`: shape `(count, d)`: mean of the members' rows (of their directions, where the
      method looks at directions). Its length is therefore the closer to 1 the closer the members.
    - `inertia`: Σ ‖row - centroid‖² over the same rows: what scikit-learn's `KMeans` calls inertia
      when it is given normalised rows. Rows without direction count nothing.
    - `cosine`: mean cosine similarity of the rows (those that are not zero) to their centroid.
    """

    labels: Tensor
    centroids: Tensor
    inertia: float
    cosine: float

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.centroids)


def cluster(
    x: Tensor,
    *,
    clusters: int | None = None,
    threshold: float | None = None,
    method: Method | None = None,
    seed: int = 0,
    restarts: int | None = None,
    start: Tensor | Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Clustering:
    """Partition the rows of a matrix.

    Spherical k-means (Dhillon & Modha, "Concept decompositions for large sparse text data using clustering", 2001)
    maximises Σ_c ‖Σ_{i in c} x_i/‖x_i‖‖. Lloyd's steps are followed by single moves that better the objective ("first
    variation", Dhillon, Guan & Kogan 2002), which matter where clusters have only two or three members.

    **Arguments:**

    - `x`: shape `(n, d)`, any floating type and device; the work is done there. Not modified.
    - `clusters`: how many clusters; more than there are rows means one for every row.
    - `threshold`: instead, the cosine similarity that *any two* rows of a cluster must have (complete linkage).
    - `method`: `"spherical"`: k-means on directions (default); `"euclidean"`: k-means on the rows
      as they are; `"agglomerative"`: complete linkage on cosine distance (default with a threshold).
    - `seed`: of the k-means++ start; a generator of its own, PyTorch's global one is not touched.
    - `start`: shape `(n,)`: labels to go on from instead of k-means++ (k-means only).
    - `restarts`: k-means++ starts, run as one batch (besides `start`); the best objective wins. By default 4, or
      none with `start`.
    - `weights`: shape `(n,)`, not negative: how much each row counts in the objective (spherical k-means only).

    **Returns:** a `Clustering`. Rows that are zero have no direction: they join the first cluster,
    or one of their own if `clusters` exceeds the number of rows that have one.

    **Raises:** `ConfigError` on contradictory options, `ModelError` if `x` is not finite.

    ```python
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1]])
    >>> cluster(x, clusters=2).labels.tolist()
    [0, 1, 0]

    ```
    """
    method = method or ("spherical" if threshold is None else "agglomerative")
    _check(x, clusters, threshold, method)
    rows = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise ModelError("can't cluster rows that hold NaN or infinity: has the training diverged?")
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if method != "euclidean":
            rows = directions(rows)
        alive = rows.any(dim=1) if method != "euclidean" else rows.new_ones(len(rows), dtype=torch.bool)
        given = None if start is None else torch.as_tensor(start, device=rows.device, dtype=torch.int64)
        if weights is not None:
            weights = _checked_weights(weights, len(rows), method).to(rows)
        tries = restarts if restarts is not None else 4 if start is None else 0
        labels = _partition(rows, alive, clusters, threshold, method, seed, tries, given, weights)
        return _describe(rows, alive, _canonical(labels))


def moved(before: Tensor | Sequence[int], after: Tensor | Sequence[int]) -> int:
    """How many rows changed cluster between two labelings of the same n rows.

    Clusters are matched one to one so that as few as possible count as moved (Hungarian method), hence mere
    renumbering is no move.

    >>> moved([0, 0, 1, 1, 2], [1, 1, 0, 0, 0])
    1
    """
    from scipy.optimize import linear_sum_assignment

    old = torch.as_tensor(before, dtype=torch.int64).cpu()
    new = torch.as_tensor(after, dtype=torch.int64).cpu()
    if not len(old):
        return 0
    overlap = torch.zeros(int(old.max()) + 1, int(new.max()) + 1, dtype=torch.int64)
    overlap.index_put_((old, new), torch.ones_like(old), accumulate=True)
    row, column = linear_sum_assignment(overlap.numpy(), maximize=True)
    return len(old) - int(overlap[row, column].sum())


def _check(x: Tensor, clusters: int | None, threshold: float | None, method: str) -> None:
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise ConfigError(f"clustering needs a floating matrix (n, d) with entries, not {tuple(x.shape)} of {x.dtype}")
    if method not in METHODS:
        raise ConfigError(f"unknown clustering method {method!r}: choose one of {', '.join(METHODS)}")
    if (clusters is None) == (threshold is None):
        raise ConfigError("say either how many clusters or the similarity threshold, not both or neither")
    if clusters is not None and clusters < 1:
        raise ConfigError(f"clusters={clusters}: at least one cluster is needed")
    if threshold is not None and method != "agglomerative":
        raise ConfigError(f"a similarity threshold needs method='agglomerative', not {method!r}")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold}: a cosine similarity lies in [-1, 1]")


def _partition(
    rows: Tensor,
    alive: Tensor,
    clusters: int | None,
    threshold: float | None,
    method: Method,
    seed: int,
    restarts: int,
    start: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Labels (any numbering) of all rows; those without direction are set aside first."""
    members = alive.nonzero().squeeze(1)
    labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    if not len(members):
        return labels
    if start is not None and start.shape != labels.shape:
        raise ConfigError(f"start has shape {tuple(start.shape)} for {len(rows)} rows")
    if clusters is not None and clusters >= len(members):
        part = torch.arange(len(members), device=rows.device)
    elif method == "agglomerative":
        part = _agglomerative(rows[members], clusters, threshold)
    else:
        assert clusters is not None
        begin = None if start is None else _canonical(start[members])
        own = None if weights is None else weights[members]
        part = kmeans(rows[members], clusters, method == "spherical", seed, restarts, begin, own)
    labels[members] = part
    spare = clusters is not None and clusters > len(members)
    labels[~alive] = len(members) if spare else part[0]
    return labels


def _canonical(labels: Tensor) -> Tensor:
    """The same partition, clusters numbered in the order of their first members."""
    _, inverse = torch.unique(labels, return_inverse=True)
    count = int(inverse.max()) + 1
    position = torch.arange(len(labels), device=labels.device)
    first = torch.full((count,), len(labels), device=labels.device).scatter_reduce(0, inverse, position, "amin")
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(count, device=labels.device)
    return rank[inverse]


def _describe(rows: Tensor, alive: Tensor, labels: Tensor) -> Clustering:
    count = int(labels.max()) + 1
    weight = torch.nn.functional.one_hot(labels, count).to(rows) * alive.to(rows)[:, None]
    centroids = (weight.T @ rows) / weight.sum(dim=0).clamp(min=1)[:, None]
    own = centroids[labels]
    inertia = float(((rows - own).square().sum(dim=1) * alive).sum())
    cosines = (directions(rows) * directions(own)).sum(dim=1)
    cosine = float(cosines[alive].mean()) if bool(alive.any()) else 1.0
    return Clustering(labels=labels, centroids=centroids, inertia=inertia, cosine=cosine)


def _agglomerative(rows: Tensor, clusters: int | None, threshold: float | None) -> Tensor:
    from scipy.cluster.hierarchy import complete, cut_tree

    if len(rows) == 1:
        return torch.zeros(1, dtype=torch.int64, device=rows.device)
    unit = directions(rows).double()
    distance = (1 - unit @ unit.T).clamp(min=0).cpu()
    above = torch.triu_indices(len(rows), len(rows), 1)
    merges = complete(distance[above[0], above[1]].numpy())
    if threshold is not None:  # rows at exactly the asked similarity belong together, whatever the rounding
        clusters = 1 + int((merges[:, 2] > 1 - threshold + 1e-9).sum())
    return torch.as_tensor(cut_tree(merges, [clusters or 1])[:, 0], dtype=torch.int64, device=rows.device)


def _checked_weights(weights: Tensor, n: int, method: str) -> Tensor:
    if method != "spherical":
        raise ConfigError(f"weights are for spherical k-means, not {method!r}")
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ConfigError(f"weights must be {n} finite numbers that are not negative")
    return weights.detach()
