"""The pull that draws the filters of one cluster together while training, as a loss or as a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..plan import ChannelGroup
from .assign import ClusteredRows
from .folding import FILTER_ROLES, signs


class _PullFunction(torch.autograd.Function):
    """Σ_j ‖u_j - ū‖² / 2 over the rows of one weight along its first axis"""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, labels: Tensor, mean: Tensor, sign: Tensor | None) -> Tensor:
        """`labels` `(n,)`; `mean` `(k, n)` averages the rows of each cluster; `sign` `(n, 1)` or None."""
        value, grad = value_and_gradient(weight.detach(), labels, mean, sign)
        ctx.save_for_backward(grad.to(weight.dtype).view_as(weight))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor, None, None, None]:
        """The stored gradient, scaled."""
        (grad,) = ctx.saved_tensors
        return grad * outputs[0], None, None, None


def value_and_gradient(weight: Tensor, labels: Tensor, mean: Tensor, sign: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pull and its gradient, shape `(n, d)` in at least 32 bits; arguments as for `pull`."""
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        inverse = _inverse(rows, sign)
        unit = rows * inverse
        own = means(unit, labels, mean.to(rows)).index_select(0, labels)
        cosine = (unit * own).sum(dim=1, keepdim=True)
        value: Tensor = ((inverse != 0).to(rows) - cosine).sum() / 2  # rows of length 0 have no direction
        return value, unit.mul_(cosine * inverse).addcmul_(own, inverse, value=-1)


def add_gradient(
    grad: Tensor, rows: Tensor, labels: Tensor, mean: Tensor, sign: Tensor | None, strength: float, buffer: Tensor
) -> None:
    """Add strength times the gradient to `grad`, in place and without new memory: it is done after every batch.

    **Arguments:**

    - `grad`, `rows`: shape `(n, d)`, both float32 or float64. The others as for `pull`.
    - `buffer`: shape `(3, n · d)` or longer, to work in.
    """
    with torch.autocast(rows.device.type, enabled=False):
        unit, own, centres = (part[: rows.numel()].view_as(rows) for part in buffer)
        inverse = _inverse(rows, sign)
        torch.mul(rows, inverse, out=unit)
        torch.index_select(means(unit, labels, mean, centres[: len(mean)]), 0, labels, out=own)
        grad.addcmul_(own, inverse, value=-strength)
        cosine = own.mul_(unit).sum(dim=1, keepdim=True)
        grad.addcmul_(unit, cosine * inverse, value=strength)


def _inverse(rows: Tensor, sign: Tensor | None) -> Tensor:
    """±1 / ‖w_j‖ in a column, 0 for a row of length 0."""
    length = rows.norm(dim=1, keepdim=True)
    inverse = torch.where(length > torch.finfo(rows.dtype).tiny, length.reciprocal(), 0)
    return inverse if sign is None else inverse * sign


def means(unit: Tensor, labels: Tensor, mean: Tensor, out: Tensor | None = None) -> Tensor:
    """Means of the rows `(n, d)` of each cluster, shape `(k, d)`; `mean` is what `averager` gives.

    On a CPU rows are added one by one, which is cheaper than a product; on a GPU that would not be deterministic.
    The largest entry of each row of `mean` is then enough, shape `(k, 1)`.
    """
    out = unit.new_empty(len(mean), unit.shape[1]) if out is None else out
    if unit.device.type != "cpu":
        return torch.mm(mean, unit, out=out)
    return out.zero_().index_add_(0, labels, unit).mul_(mean.amax(dim=1, keepdim=True))


def pull(weight: Tensor, labels: Tensor, mean: Tensor, sign: Tensor | None = None) -> Tensor:
    """Half the summed squared distances of the rows' directions to their clusters' means, differentiable once.

    **Arguments:**

    - `weight`: shape `(n, …)`: filters along the first axis.
    - `labels`: shape `(n,)`: cluster of each filter.
    - `mean`: shape `(k, n)`: what `averager(labels)` gives.
    - `sign`: shape `(n, 1)`, ±1: filters that count as their negatives.

    ```python
    >>> labels = torch.tensor([0, 0, 1])
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    >>> value = pull(weight, labels, averager(labels)); value.item()
    0.5
    >>> value.backward(); weight.grad.tolist()
    [[0.0, -0.5], [-0.25, 0.0], [0.0, 0.0]]

    ```
    """
    value: Tensor = _PullFunction.apply(weight, labels, mean, sign)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return value


def averager(labels: Tensor) -> Tensor:
    """The matrix, shape `(k, n)`, that takes rows to the means of their clusters.

    >>> averager(torch.tensor([0, 1, 0])).tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    """
    member = torch.nn.functional.one_hot(labels).T.float()
    return member / member.sum(dim=1, keepdim=True).clamp(min=1)


class CosinePull:
    """The pull on all filters of the clustered groups; laid out once for all batches until clusters change.

    **Arguments:**

    - `groups`; `labels`: group name → cluster of each unit, `(size,)`; `tensors`: the model's, by name.
    - `strength`: λ.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        labels: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        strength: float,
    ) -> None:
        self.strength = strength
        self.rows = _pulled_rows(groups, labels, tensors)

    def loss(self) -> Tensor | None:
        """The term, differentiable once; None without filters."""
        values = [entry.value() for entry in self.rows]
        return self.strength * sum(values[1:], values[0]) if values else None

    def add_gradients(self) -> None:
        """Add to the gradients what the term would."""
        for entry in self.rows:
            entry.add_gradient(self.strength)


@dataclass(frozen=True, slots=True)
class _PulledRows:
    """The filters of one parameter; `mean` as for `pull`; `buffer` is memory to work in, which all of them share."""

    rows: ClusteredRows
    mean: Tensor
    buffer: Tensor

    def value(self) -> Tensor:
        """The clustering term of this parameter."""
        rows = self.rows
        return pull(rows.pick(rows.parameter), rows.labels, self.mean, rows.sign)

    def add_gradient(self, strength: float) -> None:
        """Add strength times the term's gradient to the parameter's."""
        own, labels, sign = self.rows, self.rows.labels, self.rows.sign
        parameter = own.parameter.detach()
        if own.parameter.grad is None:
            own.parameter.grad = torch.zeros_like(parameter)
        grad = own.parameter.grad
        rows, place = self._as_stored(parameter), self._as_stored(grad)
        wide = rows.dtype == place.dtype and rows.dtype in (torch.float32, torch.float64)
        if own.positions is None and wide and place.is_contiguous():
            add_gradient(place.flatten(1), rows.flatten(1), labels, self.mean, sign, strength, self.buffer)
            return
        rows = own.pick(parameter)
        gradient = value_and_gradient(rows, labels, self.mean, sign)[1].to(grad.dtype).view_as(rows)
        if own.positions is None:
            grad.movedim(own.axis, 0).add_(gradient, alpha=strength)
        else:
            grad.movedim(own.axis, 0).index_add_(0, own.positions, gradient, alpha=strength)

    def _as_stored(self, tensor: Tensor) -> Tensor:
        """The filters' axis first, the others as they lie in the parameter's memory: flat rows are then a view."""
        first = self.rows.parameter.movedim(self.rows.axis, 0)
        others = sorted(range(1, first.dim()), key=first.stride, reverse=True)
        return tensor.movedim(self.rows.axis, 0).permute(0, *others)


def _pulled_rows(
    groups: Sequence[ChannelGroup], labels: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[_PulledRows]:
    """Every trainable filter tensor of the groups that have labels."""
    found = [
        ClusteredRows.of(piece, tensors[piece.tensor], labels[group.name], signs(group, tensors))
        for group in groups
        for piece in group.producers
        if group.name in labels and piece.role in FILTER_ROLES and tensors[piece.tensor].requires_grad
    ]
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for parameter in sorted((rows.parameter for rows in found), key=torch.numel, reverse=True):
        device, dtype = parameter.device, parameter.dtype
        if (device, dtype) not in buffers:
            buffers[device, dtype] = torch.empty(3, parameter.numel(), device=device, dtype=dtype)
    pulled = []
    for rows in found:
        device, dtype = rows.parameter.device, rows.parameter.dtype
        mean = averager(rows.labels).to(torch.promote_types(dtype, torch.float32))
        mean = mean.amax(dim=1, keepdim=True) if device.type == "cpu" else mean  # all that `means` asks for there
        pulled.append(_PulledRows(rows, mean, buffers[device, dtype]))
    return pulled
