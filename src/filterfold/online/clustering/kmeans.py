"""k-means on inner products: restarts as one batch, then single moves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ConfigError

_ROUNDS = 100


def kmeans(
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
