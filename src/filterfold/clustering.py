"""Grouping vectors that point the same way: k-means on directions, and its relatives.

This room knows matrices, not modules. Filters are few and long (512 × 4608 in VGG-16), so k-means runs on the n × n
matrix of inner products instead of the rows themselves: with S[i, c] = Σ_{j in c} x_i·x_j and N_c = ‖Σ_{j in c}
x_j‖² every distance, every objective and every move follows, an iteration costs O(n²) and not O(n·k·d), and
restarts run as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError, ModelError

Method = Literal["spherical", "euclidean", "agglomerative"]
METHODS: tuple[Method, ...] = ("spherical", "euclidean", "agglomerative")

_ROUNDS = 100


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

    **Arguments:**

    - `x`: shape `(n, d)`, any floating type and device; the work is done there. Not modified.
    - `clusters`: how many clusters; more than there are rows means one for every row.
    - `threshold`: instead, the cosine similarity that *any two* rows of a cluster must have (complete linkage).
    - `method`: `"spherical"`: k-means on directions (default); `"euclidean"`: k-means on the rows
      as they are; `"agglomerative"`: complete linkage on cosine distance through scikit-learn
      (default with a threshold).
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


def spherical_kmeans(
    x: Tensor, k: int, *, seed: int = 0, restarts: int | None = None, start: Tensor | Sequence[int] | None = None
) -> Clustering:
    """Spherical k-means: `cluster` by the directions of the rows of `x`, shape `(n, d)`, into `k` clusters.

    Dhillon & Modha, "Concept decompositions for large sparse text data using clustering" (2001): maximise
    Σ_c ‖Σ_{i in c} x_i/‖x_i‖‖. Lloyd's steps are followed by single moves that better the objective ("first
    variation", Dhillon, Guan & Kogan 2002), which matter where clusters have only two or three members.
    """
    return cluster(x, clusters=k, seed=seed, restarts=restarts, start=start)


def directions(x: Tensor) -> Tensor:
    """The rows of `x`, shape `(n, d)`, scaled to length 1; zero rows stay zero.

    >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6..., 0.8...], [0.0, 0.0]]
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = x / largest.where(largest > 0, 1)  # first, so that tiny rows don't underflow when squared
    length = scaled.norm(dim=1, keepdim=True)
    return torch.div(scaled, length.where(length > 0, 1))


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
        part = _kmeans(rows[members], clusters, method == "spherical", seed, restarts, begin, own)
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
    from sklearn.cluster import AgglomerativeClustering

    if len(rows) == 1:
        return torch.zeros(1, dtype=torch.int64, device=rows.device)
    unit = directions(rows).double()
    distance = (1 - unit @ unit.T).clamp(min=0).cpu().numpy()
    # scikit-learn merges while the distance is *below* its threshold; rows at exactly the asked similarity belong.
    limit = None if threshold is None else math.nextafter(1 - threshold, math.inf) + 1e-9
    model = AgglomerativeClustering(clusters, metric="precomputed", linkage="complete", distance_threshold=limit)
    return torch.as_tensor(model.fit_predict(distance), dtype=torch.int64, device=rows.device)


def _kmeans(
    rows: Tensor,
    k: int,
    spherical: bool,
    seed: int,
    restarts: int,
    start: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Labels of k-means with k < n; every cluster has a member.

    Weighted spherical k-means maximises Σ_c ‖Σ w_i x_i‖: the same search over rows of lengths w_i.
    """
    if not spherical:
        rows = rows - rows.mean(dim=0)  # distances don't change, cancellation shrinks
    gram = rows @ rows.T
    even = torch.ones_like(rows[:, 0]) if weights is None else _even(weights)
    if start is not None and int(start.max()) >= k:
        raise ConfigError(f"start has {int(start.max()) + 1} clusters, more than the {k} asked for")
    begins = [] if start is None else [start[None]]
    if restarts > 0 or not begins:
        begins.append(_plus_plus(gram, even, k, seed, max(restarts, 1)))
    labels = torch.cat(begins)
    search = _Search(gram if weights is None else gram * even[:, None] * even, k, spherical, labels)
    search.lloyd()
    search.single_moves()
    return search.best()


def _even(weights: Tensor) -> Tensor:
    """Weights around 1, none so small that its row would be lost in rounding."""
    return (weights / weights.mean()).nan_to_num(1.0).clamp(min=1e-3)


def _checked_weights(weights: Tensor, n: int, method: str) -> Tensor:
    if method != "spherical":
        raise ConfigError(f"weights are for spherical k-means, not {method!r}")
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ConfigError(f"weights must be {n} finite numbers that are not negative")
    return weights.detach()


def _plus_plus(gram: Tensor, weights: Tensor, k: int, seed: int, restarts: int) -> Tensor:
    """Labels, shape `(restarts, n)`, of greedy k-means++ (Arthur & Vassilvitskii 2007): nearest of k chosen rows.

    Of 2 + ln k candidates for every centre, drawn with probability ∝ squared distance, the one is taken that
    lowers the sum of distances most (as scikit-learn does it).
    """
    n, trials = len(gram), 2 + int(math.log(k))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(k, restarts, trials, generator=generator, dtype=torch.float64).to(gram)
    square = gram.diagonal()
    distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0)
    noise = 64 * torch.finfo(gram.dtype).eps * (square[:, None] + square[None, :])
    distance = distance.where(distance > noise, 0) * weights  # rows that are equal up to rounding: never two centres
    centre = (draws[0, :, 0] * n).long().clamp(max=n - 1)
    closest = distance[centre]
    labels = torch.zeros(restarts, n, dtype=torch.int64, device=gram.device)
    every = torch.arange(restarts, device=gram.device)
    for index in range(1, k):
        steps = closest.cumsum(dim=1)
        candidates = torch.searchsorted(steps, draws[index] * steps[:, -1:], right=True).clamp(max=n - 1)
        offered = torch.minimum(distance[candidates], closest[:, None, :])
        winner = offered.sum(dim=2).argmin(dim=1)
        nearest = offered[every, winner]
        labels = torch.where(nearest < closest, index, labels)
        closest = nearest
    return labels


class _Search:
    """Restarts of k-means as one batch, on inner products alone.

    `labels` is `(restarts, n)`; `inner[r, c, i]` = x_i·Σ_{j in c} x_j; `square[r, c]` = ‖Σ_{j in c} x_j‖²;
    `sizes[r, c]`. Objective to maximise: Σ √square (spherical), Σ square / size (Euclidean).
    """

    def __init__(self, gram: Tensor, k: int, spherical: bool, labels: Tensor) -> None:
        self.gram, self.k, self.spherical, self.labels = gram, k, spherical, labels
        self.own = gram.diagonal().contiguous()
        self.slack = 16 * torch.finfo(gram.dtype).eps * float(self.own.max().clamp(min=torch.finfo(gram.dtype).tiny))
        self._sum()
        self._repair()

    def _sum(self) -> None:
        restarts, n = self.labels.shape
        member = torch.zeros(restarts, self.k, n, dtype=self.gram.dtype, device=self.gram.device)
        member.scatter_(1, self.labels[:, None, :], 1)
        self.inner = member @ self.gram  # not index_add: that is not deterministic on a GPU
        self.square = (member * self.inner).sum(dim=2).clamp(min=0)
        self.sizes = member.sum(dim=2)

    def _value(self, square: Tensor, sizes: Tensor) -> Tensor:
        return square.clamp(min=0).sqrt() if self.spherical else square / sizes.clamp(min=1)

    def _similarity(self) -> Tensor:
        """Shape `(restarts, k, n)`: the higher, the nearer; -inf for empty clusters."""
        if self.spherical:
            value = self.inner / self.square.sqrt().clamp(min=torch.finfo(self.inner.dtype).tiny)[..., None]
        else:
            size = self.sizes.clamp(min=1)
            value = 2 * self.inner / size[..., None] - (self.square / size.square())[..., None]
        return value.masked_fill((self.sizes == 0)[..., None], -math.inf)

    def _repair(self) -> None:
        """Give every empty cluster the row that fits worst where it is, out of a cluster of two or more."""
        while bool((self.sizes == 0).any()):
            fit = self._similarity().gather(1, self.labels[:, None, :])[:, 0] - (0 if self.spherical else self.own)
            fit = fit.masked_fill(self.sizes.gather(1, self.labels) < 2, math.inf)
            for restart in (self.sizes == 0).any(dim=1).nonzero().squeeze(1).tolist():
                empty = int((self.sizes[restart] == 0).nonzero()[0, 0])
                self.labels[restart, int(fit[restart].argmin())] = empty
            self._sum()

    def lloyd(self) -> None:
        """Assign every row to its nearest centroid until nothing changes."""
        for _ in range(_ROUNDS):
            similarity = self._similarity()
            best, labels = similarity.max(dim=1)
            stay = similarity.gather(1, self.labels[:, None, :])[:, 0]
            labels = torch.where(best > stay + self.slack, labels, self.labels)
            if torch.equal(labels, self.labels):
                return
            self.labels = labels
            self._sum()
            self._repair()

    def single_moves(self) -> None:
        """Move single rows while that betters the objective; moves that share no cluster go together."""
        for _ in range(_ROUNDS):
            gain, target = self._gains()
            accept = self._independent(gain, target)
            if not bool(accept.any()):
                return
            self.labels = torch.where(accept, target, self.labels)
            self._sum()

    def _gains(self) -> tuple[Tensor, Tensor]:
        """For every row what its best move to another cluster wins, and where to; shapes `(restarts, n)`."""
        value = self._value(self.square, self.sizes)
        grown = self.square[..., None] + 2 * self.inner + self.own
        joins = self._value(grown, self.sizes[..., None] + 1) - value[..., None]
        joins.scatter_(1, self.labels[:, None, :], -math.inf)
        best, target = joins.max(dim=1)
        square, sizes = self.square.gather(1, self.labels), self.sizes.gather(1, self.labels)
        left = square - 2 * self.inner.gather(1, self.labels[:, None, :])[:, 0] + self.own
        leaves = self._value(left, sizes - 1) - value.gather(1, self.labels)
        return (best + leaves).masked_fill(sizes < 2, -math.inf), target

    def _independent(self, gain: Tensor, target: Tensor) -> Tensor:
        """The moves that win something and are the best among all that touch their two clusters."""
        n = gain.shape[1]
        order = gain.argsort(dim=1, stable=True)
        place = torch.arange(n, device=gain.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        rank = torch.where(gain > 4 * self.slack, rank, -1)
        top = torch.full(self.sizes.shape, -1, dtype=torch.int64, device=gain.device)
        top = top.scatter_reduce(1, self.labels, rank, "amax").scatter_reduce(1, target, rank, "amax")
        return (rank >= 0) & (rank == top.gather(1, self.labels)) & (rank == top.gather(1, target))

    def best(self) -> Tensor:
        """Labels of the restart with the highest objective, shape `(n,)`."""
        total = self._value(self.square, self.sizes).sum(dim=1)
        return self.labels[int(total.argmax())]
