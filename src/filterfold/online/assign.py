"""One group's filters into clusters, and clusters laid out along the rows of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ..plan import ChannelGroup, Slice
from ..pruning.budgets.ranking import parts
from .clustering import Clustering, cluster, moved
from .folding import Features, features, importance


class ClusterRow(TypedDict):
    """One group's clusters at one update: what a record's `clusters_history` holds.

    `k` clusters; `inertia` Σ ‖direction - cluster mean‖²; `cosine` mean similarity of filters to their cluster's
    mean; `changed` how many filters are in another cluster than last time (all of them the first time).
    """

    epoch: int
    group: str
    k: int
    inertia: float
    cosine: float
    changed: int


def read_row(row: Mapping[str, Any]) -> ClusterRow:
    """A row as it was written down."""
    return cast(ClusterRow, {name: row[name] for name in ClusterRow.__annotations__})


def summary(rows: Sequence[ClusterRow], sizes: Mapping[str, int]) -> str:
    """One line for logs and records; `sizes`: group → units."""
    total = sum(sizes[row["group"]] for row in rows)
    cosine = sum(row["cosine"] * sizes[row["group"]] for row in rows) / total
    return f"clusters: {sum(row['changed'] for row in rows)} of {total} filters moved, mean cosine {cosine:.3f}"


def regroup(
    group: ChannelGroup,
    tensors: Mapping[str, Tensor],
    wanted: Sequence[int] | float,
    before: Tensor | None,
    *,
    kind: Features = "units",
    seed: int = 0,
    fresh: bool = False,
    epoch: int = 0,
) -> tuple[Tensor, ClusterRow]:
    """Cluster the units of a group, each part (class and block) by itself; important units count more.

    **Arguments:**

    - `wanted`: clusters of each part, or one similarity threshold.
    - `before`: labels of last time to go on from, `(size,)`.
    - `fresh`: try new starts too, and take what is better.

    **Returns:** labels `(size,)` on the CPU, and what they are like.
    """
    labels = torch.zeros(group.size, dtype=torch.int64)
    rows, weights = features(group, tensors, kind), importance(group, tensors)
    count, inertia, cosine = 0, 0.0, 0.0
    for index, part in enumerate(parts(group)):
        units = torch.tensor(part.units)
        x = rows[units]
        start = None if before is None else before[units]
        if isinstance(wanted, float):
            found = cluster(x, threshold=wanted)
        else:
            found = _partition(x, wanted[index], weights[units], start, seed, fresh)
        labels[units] = found.labels.cpu() + count
        count += found.count
        inertia += found.inertia
        cosine += found.cosine * len(units) / group.size
    changed = group.size if before is None else moved(before, labels)
    row = ClusterRow(epoch=epoch, group=group.name, k=count, inertia=inertia, cosine=cosine, changed=changed)
    return labels, row


def along(piece: Slice, labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """Labels along a slice's axis: `(positions, their labels)`; positions None where every position is its own unit.

    Where a unit owns several positions, the i-th ones are compared with each other.

    >>> from filterfold.plan import Slice
    >>> along(Slice("fc.weight", 1, (0, 0, 1, 1, -1), "filter"), torch.tensor([0, 0]))
    (tensor([0, 1, 2, 3]), tensor([0, 1, 0, 1]))
    """
    units = torch.tensor(piece.units)
    if torch.equal(units, torch.arange(len(labels))):
        return None, labels
    positions = (units >= 0).nonzero().squeeze(1)
    positions = positions[units[positions].argsort(stable=True)]
    own = units[positions]
    rank = torch.arange(len(own)) - torch.searchsorted(own, own)
    key = labels[own] * (int(rank.max()) + 1) + rank
    return positions, torch.unique(key, return_inverse=True)[1]


@dataclass(frozen=True, slots=True)
class ClusteredRows:
    """The rows of one parameter that make a group's units, with the cluster of each.

    **Arguments:**

    - `parameter`: the parameter; its rows run along `axis`.
    - `positions`: those of the rows that belong to units; None: all.
    - `labels`: shape `(n,)`: cluster of each row.
    - `sign`: shape `(n, 1)`, -1 for rows that count as their negatives; None: none does.
    """

    parameter: Tensor
    axis: int
    positions: Tensor | None
    labels: Tensor
    sign: Tensor | None

    @classmethod
    def of(cls, piece: Slice, parameter: Tensor, labels: Tensor, sign: Tensor | None) -> ClusteredRows:
        """The rows of a slice; `labels` and `sign`: of the group's units, `(size,)`."""
        positions, own = along(piece, labels)
        device = parameter.device
        if sign is not None:
            units = torch.tensor(piece.units) if positions is None else torch.tensor(piece.units)[positions]
            sign = sign[units][:, None].to(device)
        place = None if positions is None else positions.to(device)
        return cls(parameter, piece.axis, place, own.to(device), sign)

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that is laid out like the parameter, shape `(n, …)`."""
        rows = tensor.movedim(self.axis, 0) if self.axis else tensor
        return rows if self.positions is None else rows[self.positions]


def _partition(x: Tensor, k: int, weights: Tensor, start: Tensor | None, seed: int, fresh: bool) -> Clustering:
    """k-means from the clusters of last time, from new starts too if asked, or where there are too many of them."""
    if start is not None and len(torch.unique(start)) > k:
        start = None
    restarts = None if start is None or not fresh else 4
    return cluster(x, clusters=k, weights=weights, seed=seed, start=start, restarts=restarts)
