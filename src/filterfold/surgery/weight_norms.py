"""Weights that a layer divides by a length of their own: weight norm and spectral norm.

The length goes over the inputs of a kernel. When some of them leave it changes, and with it every value that stays.
Someone who cuts by hand takes the norm off, cuts, and puts it back: what stays keeps its values. The same is reached
here by a factor: on the gain `g` of a weight norm, and on the right singular vector of a spectral norm, whose estimate
uᵀWv of the largest singular value then is what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm


@dataclass(frozen=True, slots=True)
class NormedWeight:
    """One such weight, by the names of its tensors.

    **Arguments:**

    - `weight`: the tensor that is divided.
    - `dim`: the axis of its outputs; -1 where the length of a weight norm goes over everything.
    - `target`: the tensor that takes the factor: g, or the right singular vector.
    - `left`: the left singular vector; None for a weight norm.
    """

    weight: str
    dim: int
    target: str
    left: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All its tensors."""
        return (self.weight, self.target) if self.left is None else (self.weight, self.target, self.left)

    def length(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the weight is divided by: one for each output (weight norm), or one (spectral norm).

        >>> norm = NormedWeight("v", 0, "g")
        >>> norm.length({"v": torch.tensor([[3.0, 4.0], [0.0, 2.0]])})
        tensor([[5.],
                [2.]])
        """
        weight = tensors[self.weight].detach()
        if self.left is None:
            return torch.norm_except_dim(weight, 2, self.dim)
        matrix = weight.movedim(self.dim, 0).flatten(1)
        return torch.dot(tensors[self.left].detach(), matrix @ tensors[self.target].detach())

    def factor(self, before: Tensor, after: Tensor) -> Tensor:
        """What to multiply the target by, so that weights keep their values when their length changes."""
        top, bottom = (after, before) if self.left is None else (before, after)
        return torch.where((top == 0) | (bottom == 0), torch.ones_like(top), top / bottom)


_NAMES = ("_v", "_g", "_u", "_orig", ".original", ".original0", ".original1")
"""How the names of their tensors end."""


def normed_weights(model: nn.Module, touched: Iterable[str]) -> Iterator[NormedWeight]:
    """All weights of a model under weight norm or spectral norm, by hook or by parametrisation.

    `touched`: names of the tensors that change; if none of them can belong to such a weight, nothing is looked for.

    >>> model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    >>> list(normed_weights(model, [name for name, _ in model.named_parameters()]))[0].target
    '0.parametrizations.weight.original0'
    """
    if not any(name.endswith(_NAMES) for name in touched):
        return  # nearly always
    lists = nn.utils.parametrize.ParametrizationList
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, OldWeightNorm):
                yield NormedWeight(f"{prefix}{hook.name}_v", hook.dim, f"{prefix}{hook.name}_g")
            elif isinstance(hook, OldSpectralNorm):
                names = (f"{prefix}{hook.name}_{end}" for end in ("orig", "v", "u"))
                weight, right, left = names
                yield NormedWeight(weight, hook.dim, right, left)
        if isinstance(module, lists):
            first = module[0]
            if isinstance(first, _WeightNorm):
                yield NormedWeight(f"{prefix}original1", first.dim, f"{prefix}original0")
            elif isinstance(first, _SpectralNorm) and hasattr(first, "_u"):
                yield NormedWeight(f"{prefix}original", first.dim, f"{prefix}0._v", f"{prefix}0._u")
