"""The clustering term: a pull of each filter's direction towards the mean direction of its cluster.

Zhou et al., "Online Filter Clustering and Pruning for Efficient ConvNets" (ICIP 2018, arXiv 1905.11787), on
directions: with u_j = w_j / ‖w_j‖ and ū the mean over j's cluster,

    L = (λ/2) Σ_j ‖u_j - ū‖² = (λ/2) Σ_j (1 - u_j·ū),     ∂L/∂w_j = (λ/‖w_j‖) ((u_j·ū) u_j - ū).

The gradient is the same whether ū is held fixed or not, since Σ_j (u_j - ū) = 0 in each cluster. It is orthogonal to
w_j: the pull turns filters and leaves their lengths to the task. Value and gradient are computed in one go, because
letting autograd record the dozen small operations of every layer would cost more than the pull itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pull(torch.autograd.Function):
    """Σ_j ‖u_j - ū‖² / 2 over the rows of one weight along its first axis; see the module."""

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
    grad: Tensor, rows: Tensor, labels: Tensor, mean: Tensor, sign: Tensor | None, strength: float, room: Tensor
) -> None:
    """Add strength times the gradient to `grad`, in place and without new memory: it is done after every batch.

    **Arguments:**

    - `grad`, `rows`: shape `(n, d)`, both float32 or float64. The others as for `pull`.
    - `room`: shape `(3, n · d)` or longer, to work in.
    """
    with torch.autocast(rows.device.type, enabled=False):
        unit, own, centres = (part[: rows.numel()].view_as(rows) for part in room)
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
    value: Tensor = Pull.apply(weight, labels, mean, sign)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return value


def averager(labels: Tensor) -> Tensor:
    """The matrix, shape `(k, n)`, that takes rows to the means of their clusters.

    >>> averager(torch.tensor([0, 1, 0])).tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    """
    member = torch.nn.functional.one_hot(labels).T.float()
    return member / member.sum(dim=1, keepdim=True).clamp(min=1)
