"""The centripetal rule: filters of a cluster follow one common gradient and drift together until they are identical.

Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure" (CVPR 2019,
arXiv 1904.03837): with F_j in cluster c, F̄ the cluster's mean, η the weight decay and τ the learning rate

    F_j ← F_j - τ (mean over c of ∂L/∂F + η F_j + ε (F_j - F̄)).

Here gradients are rewritten, g_j ← ḡ + ε (F_j - F̄), and the optimizer, whichever it is, does the rest. Under SGD the
difference of two filters of a cluster shrinks by the factor 1 - τ (η + ε) with every step (with momentum m as if τ were
τ / (1 - m), in the long run), whatever the task says; once it is no more than rounding the fold is lossless.

All trainable entries of a unit take part. Batch norm's scale and shift are drawn together with a tenth of ε, as the
authors do. Behind a negative batch-norm scale a filter and its scale count as their negatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..plan import ChannelGroup, Slice
from .assign import ClusteredRows
from .cosine_pull import averager, means
from .folding import FILTER_ROLES, signs

_GENTLE = 0.1
"""What norms' entries get of ε: the authors' code does so."""


@dataclass(frozen=True, slots=True)
class _DrawnRows:
    """Rows of one parameter, and with what strength those of a cluster are drawn together."""

    rows: ClusteredRows
    strength: float

    @property
    def parameter(self) -> Tensor:
        """The parameter that the rows are of."""
        return self.rows.parameter

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor like the parameter, shape `(n, d)`, in at least 32 bits."""
        rows = self.rows.pick(tensor.detach())
        rows = rows.reshape(len(rows), -1)
        return rows if rows.dtype == torch.float64 else rows.float()

    def put(self, gradient: Tensor, rows: Tensor) -> None:
        """Write rows into the parameter's gradient."""
        place = gradient.movedim(self.rows.axis, 0)
        rows = rows.to(gradient.dtype).reshape(-1, *place.shape[1:])
        if self.rows.positions is None:
            place.copy_(rows)
        else:
            place.index_copy_(0, self.rows.positions, rows)


class Centripetal:
    """Rewrites the gradients of clustered units; laid out once for all batches until clusters change.

    **Arguments:**

    - `groups`; `labels`: group name → cluster of each unit, `(size,)`; `tensors`: the model's, by name.
    - `strength`: ε.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        labels: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        strength: float,
    ) -> None:
        rows = [
            found
            for group in groups
            if group.name in labels
            for found in _of(group, labels[group.name], tensors, strength)
        ]
        self._device = rows[0].parameter.device.type if rows else "cpu"
        self._wide = [(entry, averager(entry.rows.labels)) for entry in rows if entry.parameter.ndim > 1]
        narrow: dict[tuple[torch.device, torch.dtype], list[_DrawnRows]] = {}
        for entry in rows:
            if entry.parameter.ndim == 1:
                narrow.setdefault((entry.parameter.device, entry.parameter.dtype), []).append(entry)
        self._narrow = [_Vectors(entries) for entries in narrow.values()]

    def merge(self) -> None:
        """g_j ← mean of the cluster's gradients + ε (F_j - F̄), in place; parameters without gradient are left out."""
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            for entry, mean in self._wide:
                gradient = entry.parameter.grad
                if gradient is None:
                    continue
                weight = entry.pick(entry.parameter)
                rows = entry.pick(gradient).sub(weight, alpha=entry.strength)
                rows = rows if entry.rows.sign is None else rows.mul_(entry.rows.sign)
                rows = means(rows, entry.rows.labels, mean.to(rows))[entry.rows.labels]
                rows = rows if entry.rows.sign is None else rows.mul_(entry.rows.sign)
                entry.put(gradient, rows.add_(weight, alpha=entry.strength))
            for vectors in self._narrow:
                vectors.merge()


class _Vectors:
    """All biases and norm entries of the network as one vector: dozens of tiny tensors would cost more in calls."""

    def __init__(self, entries: Sequence[_DrawnRows]) -> None:
        self.entries = entries
        device, count, labels = entries[0].parameter.device, 0, []
        for entry in entries:
            labels.append(entry.rows.labels + count)
            count += int(entry.rows.labels.max()) + 1
        self.sizes = [len(entry.rows.labels) for entry in entries]
        self.labels = torch.cat(labels)
        ones = [torch.ones(size, device=device) for size in self.sizes]
        self.strength = torch.cat([one * entry.strength for one, entry in zip(ones, entries, strict=True)])
        signs_ = [
            one if entry.rows.sign is None else entry.rows.sign[:, 0] for one, entry in zip(ones, entries, strict=True)
        ]
        self.sign = torch.cat(signs_)
        self.members = _members(self.labels)
        self.share = 1 / torch.bincount(self.labels).to(self.strength)

    def merge(self) -> None:
        weights, gradients = [], []
        for entry in self.entries:
            own = entry.parameter.grad
            weights.append(entry.pick(entry.parameter))
            gradients.append(torch.zeros_like(weights[-1]) if own is None else entry.pick(own))
        weight = torch.cat(weights)[:, 0]
        drawn = weight * self.strength.to(weight)
        rows = torch.cat(gradients)[:, 0].sub_(drawn).mul_(self.sign.to(weight))
        padded = torch.cat((rows, rows.new_zeros(1)))
        # A sum over gathered rows, not index_add: that is not deterministic on a GPU, and ranks would drift apart.
        mean = padded[self.members].sum(dim=1).mul_(self.share.to(weight))
        merged = mean[self.labels].mul_(self.sign.to(weight)).add_(drawn)
        for entry, part in zip(self.entries, torch.split(merged, self.sizes), strict=True):
            if entry.parameter.grad is not None:
                entry.put(entry.parameter.grad, part)


def _of(group: ChannelGroup, labels: Tensor, tensors: Mapping[str, Tensor], strength: float) -> list[_DrawnRows]:
    """Every trainable parameter that makes the group's units."""
    sign, found = signs(group, tensors), []
    for piece in group.producers:
        parameter = tensors[piece.tensor]
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
            rows = ClusteredRows.of(piece, parameter, labels, sign if _is_signed(piece) else None)
            gentle = piece.role not in (*FILTER_ROLES, "bias")
            found.append(_DrawnRows(rows, _GENTLE * strength if gentle else strength))
    return found


def _is_signed(piece: Slice) -> bool:
    """Whether an entry counts as its negative behind a negative batch-norm scale: all but the norm's shift."""
    return piece.role in (*FILTER_ROLES, "bias") or piece.tensor.endswith("weight")


def _members(labels: Tensor) -> Tensor:
    """Positions of the members of each cluster, shape `(k, largest)`, padded with n.

    >>> _members(torch.tensor([0, 1, 0])).tolist()
    [[0, 2], [1, 3]]
    """
    count = torch.bincount(labels)
    order = labels.argsort(stable=True)
    rank = torch.arange(len(labels), device=labels.device) - (count.cumsum(0) - count)[labels[order]]
    members = torch.full((len(count), int(count.max())), len(labels), device=labels.device)
    members[labels[order], rank] = order
    return members
