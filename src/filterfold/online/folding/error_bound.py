"""How wrong a fold that is not exact can be, known from the weights alone.

Let a layer make z_j = a_j·x + c_j at every position (a filter with its batch norm in eval mode, x the patch that it
sees), let y_j = act(z_j), and let the next layer read y_j with kernels K_j. After a fold it reads g_j·y_r with the same
kernels, r the representative and g_j the member's factor. If act is 1-Lipschitz and act(t·z) = t·act(z) for t ≥ 0
(ReLU and leaky ReLU, average pooling, max pooling without overlap, flattening, and chains of these), then over a batch

    ‖y_j - g_j y_r‖ ≤ ‖z_j - g_j z_r‖ ≤ ‖ρ_j‖ ‖x̃‖,    ρ_j = (a_j - g_j a_r, c_j - g_j c_r),

by Cauchy-Schwarz at every position, where x̃ holds all patches, each with a 1 appended. What the next layer gives,
before its own norm and activation, so changes by at most

    gain · ‖x̃‖,    gain = min( Σ_j ‖K_j‖ ‖ρ_j‖,  Σ_q ‖K_q‖₂ ‖(ρ_j)_j‖₂ ),

by the triangle inequality over units (‖K_j‖² = Σ_o (Σ_q |K_oqj|)², after Young), or over the taps q of its kernel,
K_q then being the matrix from units to outputs. Spectral norms are bounded by ‖A‖₂⁸ ≤ ‖(AAᵀ)²‖²_F. A dropped unit has
g_j = 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ...plan import DROPPED, Cut, Plan, Slice
from ...utils.inputs import call
from ...utils.model_state import preserved
from ...utils.modules import named_tensors, unwrap
from .units import ProducerLayer, only_norm, producer_layers

_LEAVES = {"weight", "bias"}


_CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


@dataclass(frozen=True, slots=True)
class FoldBound:
    """What one group's cut, by itself, can change in the layers that read it.

    It holds in eval mode for the change that comes through the group's own channels, everything else that the layers
    read being as it was, where nothing but ReLU-like functions lies between (see the module).

    **Arguments:**

    - `gain`: for every input ‖output after - output before‖ ≤ gain · ‖x̃‖, output being that of a layer that reads the
      group (a convolution's or a linear layer's, before norm and activation), x̃ the patches that the group's own
      filters see, each with a 1 appended; the largest over these layers.
    - `relative`: bound of ‖output after - output before‖ / ‖output before‖ on the example inputs; likewise.
    """

    gain: float
    relative: float


def bounds(model: nn.Module, plan: Plan, inputs: Any) -> dict[str, FoldBound]:
    """Bounds of all groups that a plan cuts and for which one can be known.

    That is where the units are made by one convolution or linear layer with at most one batch norm, which follows it
    directly, each used once, and read by convolutions without groups and linear layers.

    **Arguments:**

    - `model`: as it is before the cut; `plan`: not applied yet; `inputs`: what `relative` is measured on.

    ```python
    >>> from filterfold.plan import Slice
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> for weight, values in ((net[0].weight, [[1.0], [1.5]]), (net[2].weight, [[1.0, 1.0]])):
    ...     weight.data = torch.tensor(values)
    >>> made, read = Slice("0.weight", 0, (0, 1), "filter"), Slice("2.weight", 1, (0, 1), "kernel")
    >>> bound = bounds(net, Plan((Cut("0", (0, 0), (made,), (read,)),)), torch.tensor([[2.0]]))["0"]
    >>> round(bound.gain, 4), round(bound.relative, 4)  # both are off by a quarter of the input, 2; the output is 5
    (0.5, 0.2236)

    ```
    """
    measurement = BoundMeasurement(model, plan)
    with preserved(unwrap(model)), torch.no_grad(), measurement.watching():
        call(unwrap(model), inputs)
    return measurement.result()


class BoundMeasurement:
    """`bounds` in steps, for a caller that runs the uncut network anyway: it does so, in eval mode, `watching`."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = unwrap(model)
        tensors = dict(named_tensors(self.model))
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        cuts = [cut for cut in plan.cuts if cut.changes and all(gain >= 0 for gain in cut.gain or ())]
        found = (_site(cut, tensors, self._modules) for cut in cuts)
        self._sites = [site for site in found if site is not None and site.readers]
        self._seen: dict[str, float] = {}
        self._made: dict[str, float] = {}
        self._calls: Counter[str] = Counter()
        self._links: dict[str, tuple[Any, Any]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See one pass of the network."""
        names = {name for site in self._sites for name in site.names()}
        handles = []
        try:
            for name, module in self._modules.items():
                if name in names:
                    handles.append(module.register_forward_hook(partial(self._look, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str, module: nn.Module, data: Any, output: Tensor) -> None:
        self._calls[name] += 1
        self._links[name] = (data[0], output)
        self._made[name] = float(output.detach().cpu().double().norm())
        if any(name == site.filter.name for site in self._sites):
            self._seen[name] = _lifted(module, data[0])

    @torch.no_grad()
    def result(self) -> dict[str, FoldBound]:
        """The bounds; the network must still be uncut."""
        result = {}
        for site in self._sites:
            if not self._fits(site):
                continue
            gains = {
                owner: _gain(site.residual(piece), _kernel(self._modules[owner], piece, site.cut.size))
                for owner, piece in site.readers
            }
            seen = self._seen[site.filter.name]
            shares = [_share(gain * seen, self._made[owner]) for owner, gain in gains.items()]
            result[site.cut.group] = FoldBound(max(gains.values()), max(shares))
        self._links.clear()
        return result

    def _fits(self, site: _Site) -> bool:
        """Whether each of the layers was used once, the norm directly after the filter."""
        if any(self._calls[name] != 1 for name in site.names()):
            return False
        return site.norm is None or self._links[site.norm.name][0] is self._links[site.filter.name][1]


@dataclass(frozen=True, slots=True)
class _Site:
    """One filter, its batch norm if it has one, and the layers that read the units, by name and slice.

    `modules` are the network's, by name.
    """

    cut: Cut
    filter: ProducerLayer
    norm: ProducerLayer | None
    readers: list[tuple[str, Slice]]
    modules: Mapping[str, Any]

    def names(self) -> tuple[str, ...]:
        """All layers that have a part in it."""
        makers = (self.filter.name,) if self.norm is None else (self.filter.name, self.norm.name)
        return (*makers, *(owner for owner, _ in self.readers))

    def residual(self, piece: Slice) -> Tensor:
        """(a_j - g_j a_r, c_j - g_j c_r) of every unit, shape `(size, d + 1)`, in at least 32 bits."""
        cut = self.cut
        own = self._rows(folded=False)
        factor = torch.tensor(piece.weight or cut.gain or (1.0,) * cut.size, dtype=torch.float64).to(own)
        assignment = torch.tensor(cut.assignment, device=own.device)
        factor = torch.where(assignment == DROPPED, 0, factor)
        return own - factor[:, None] * self._rows(folded=True)[assignment.clamp(min=0)]

    def _rows(self, *, folded: bool) -> Tensor:
        """(a_j, c_j) of every unit, or of what this cut alone makes of them."""

        def entry(layer: ProducerLayer, leaf: str, otherwise: float) -> Tensor:
            value = getattr(self.modules[layer.name], leaf)
            if value is None:
                return torch.full((self.cut.new_size if folded else self.cut.size,), otherwise, device=device)
            value = value.detach().flatten(1) if value.ndim > 1 else value.detach()
            value = value if value.dtype == torch.float64 else value.float()
            return _blended(value, layer.slices[leaf], self.cut) if folded else value

        device = self.modules[self.filter.name].weight.device
        weight, shift = entry(self.filter, "weight", 0.0), entry(self.filter, "bias", 0.0)
        if self.norm is not None:
            mean, variance = entry(self.norm, "running_mean", 0.0), entry(self.norm, "running_var", 1.0)
            factor = (variance + self.modules[self.norm.name].eps).rsqrt() * entry(self.norm, "weight", 1.0)
            shift = (shift - mean) * factor + entry(self.norm, "bias", 0.0)
            weight = weight * factor[:, None]
        return torch.cat((weight, shift[:, None]), dim=1)


def _blended(value: Tensor, piece: Slice, cut: Cut) -> Tensor:
    """What the units' entries become: Σ share · entry over the units of a new index."""
    assignment = torch.tensor(cut.assignment, device=value.device)
    kept = assignment != DROPPED
    count = torch.bincount(assignment[kept], minlength=cut.new_size).to(value)
    given = piece.weight or cut.blend
    share = (
        (1 / count)[assignment.clamp(min=0)] if given is None else torch.tensor(given, dtype=torch.float64).to(value)
    )
    share = share[kept].view(-1, *[1] * (value.ndim - 1))
    return value.new_zeros(cut.new_size, *value.shape[1:]).index_add_(0, assignment[kept], share * value[kept])


def _site(cut: Cut, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> _Site | None:
    """The layers of a group whose bound can be known: one plain filter, at most one batch norm, plain readers."""
    layers = producer_layers(cut.producers)
    norm = only_norm(layers)
    filters = [layer for layer in layers if layer is not norm]
    if len(filters) != 1 or filters[0].kind != "filter" or not {"weight"} <= filters[0].slices.keys() <= _LEAVES:
        return None
    if any(piece.units != tuple(range(cut.size)) for layer in layers for piece in layer.slices.values()):
        return None  # the filter makes other groups' units, too
    made, behind = modules.get(filters[0].name), None if norm is None else modules.get(norm.name)
    if made is None or not _plain(made, filters[0].slices["weight"], 0, tensors):
        return None
    if norm is not None and (not isinstance(behind, _BatchNorm) or behind.running_mean is None):
        return None
    readers = [(piece.tensor.rpartition(".")[0], piece) for piece in cut.consumers]
    if not all(_plain(modules.get(owner), piece, 1, tensors) for owner, piece in readers):
        return None
    return _Site(cut, filters[0], norm, readers, modules)


def _plain(module: nn.Module | None, piece: Slice, axis: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a slice lies along an axis of the weight of a linear layer or a convolution without groups."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or piece.axis != axis:
        return False
    if isinstance(module, nn.modules.conv._ConvNd) and (module.groups != 1 or module.padding_mode != "zeros"):
        return False
    return tensors[piece.tensor] is module.weight


def _kernel(module: Any, piece: Slice, size: int) -> Tensor:
    """A reader's kernels, shape `(taps, outputs, positions of a unit, size)`."""
    weight: Tensor = module.weight.detach()
    units = torch.tensor(piece.units, device=weight.device)
    places = (units >= 0).nonzero().squeeze(1)
    places = places[units[places].argsort(stable=True)]
    weight = weight[:, places].clone().flatten(2) if weight.ndim > 2 else weight[:, places, None]
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return weight.permute(2, 0, 1).reshape(weight.shape[2], len(weight), size, -1).transpose(2, 3)


def _gain(residual: Tensor, kernel: Tensor) -> float:
    lengths = residual.norm(dim=1)
    changed = lengths > 0
    if not bool(changed.any()):
        return 0.0
    kernel, residual, lengths = kernel[..., changed], residual[changed], lengths[changed]
    one_by_one = float((kernel.abs().sum(dim=0).square().sum(dim=(0, 1)).sqrt() * lengths).sum())
    together = float(_spectral(kernel.flatten(2)).sum() * _spectral(residual))
    return min(one_by_one, together)


def _share(change: float, size: float) -> float:
    return change / size if size else float("inf") if change else 0.0


def _spectral(matrix: Tensor) -> Tensor:
    """An upper bound of the spectral norm, at most n^(1/8) of it too large; of matrices `(…, m, n)`."""
    size: Tensor = torch.linalg.matrix_norm(matrix)
    matrix = matrix / size.where(size > 0, 1)[..., None, None]
    gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    bound: Tensor = size * torch.linalg.matrix_norm(gram @ gram).pow(0.25).clamp(max=1)
    return bound


def _lifted(module: Any, data: Tensor) -> float:
    """‖x̃‖: all patches that a layer sees, each with a 1 appended."""
    data = data.detach().cpu().double()
    if isinstance(module, nn.Linear):
        return float((data.square().sum() + data.numel() / data.shape[-1]) ** 0.5)
    square = data.square().sum(dim=-1 - len(module.kernel_size), keepdim=True)
    ones = square.new_ones(1, 1, *module.kernel_size)
    conv = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(module, kind))
    patches = conv(square, ones, None, module.stride, module.padding, module.dilation)
    return float((patches.sum() + patches.numel()) ** 0.5)
