"""What a network costs: multiply-accumulates and parameters, layer by layer.

A MAC is one use of one weight, which is what Li et al. (2017) call a FLOP. The network runs once in
eval and inference mode, where every convolution and matrix product arrives at the dispatcher as one
op; the weight is known by following the parameters through what is computed from them, so
functional convolutions, standardised weights and shared layers are counted like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, one_line, pass_on_exhaustion
from ..utils.arguments import typed
from ..utils.inputs import batch_of, call, check_inputs, examples
from ..utils.model_state import preserved, random_state_preserved
from ..utils.modules import named_tensors
from .weight_ops import WeightOps, WeightUse


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of one weight in one kind of op, per example: `macs == weights * uses`.

    **Arguments:**

    - `name`: qualified name of the module that owns the weight.
    - `kind`: the op, such as `conv2d`, `conv_transpose2d`, `linear`, `mm`.
    - `tensor`: qualified name of the weight (of its original where it is derived from one).
    - `shape`: the weight's shape.
    - `macs`: multiply-accumulates.
    - `weights`: number of elements.
    - `uses`: multiply-accumulates per element (output positions of a convolution; input positions
      of a transposed one), summed over all calls. It does not depend on the number of channels.
    """

    name: str
    kind: str
    tensor: str
    shape: tuple[int, ...]
    macs: int
    weights: int
    uses: int


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a network, per example.

    **Arguments:**

    - `macs`: multiply-accumulates with weights, as in Table 1 of Li et al. (2017).
    - `parameters`: number of all parameters.
    - `weights`: number of convolution and linear weights only, as in that table.
    - `layers`: one entry for every weight, in the order of first use.
    - `activation_macs`: multiply-accumulates of products between activations (attention, weights
      made from the input); not part of `macs`.
    - `shapes`: parameter name → shape.
    - `uncounted`: ops that read a weight of two or more dimensions in a way that has no formula.
    """

    macs: int
    parameters: int
    weights: int
    layers: tuple[LayerCost, ...]
    activation_macs: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A plain-text table, one line a layer."""
        rows = [("layer", "kind", "shape", "MACs", "weights")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name or layer.tensor, layer.kind, shape, f"{layer.macs:,}", f"{layer.weights:,}"))
        rows.append(("total", "", "", f"{self.macs:,}", f"{self.weights:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines.append(f"{self.parameters:,} parameters in all")
        if self.activation_macs:
            lines.append(f"{self.activation_macs:,} MACs between activations")
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


@typed
def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """Count multiply-accumulates and parameters of a model.

    **Arguments:**

    - `model`: any module; runs once in eval mode and is left as it was.
    - `example_inputs`: a tensor, a tuple of arguments or a mapping of keywords; the first axis is
      the batch, of which one example is used. Where one alone can't be run (frames of a video in the batch axis), all
      are, and the cost is that of one in the mean.

    **Returns:** the `Cost` of one example.

    **Raises:** `ModelError` if the model can't be run on the inputs.

    ```python
    >>> cost = measure(nn.Conv2d(3, 8, 3, bias=False), torch.zeros(1, 3, 10, 10))
    >>> cost.macs == 8 * 3 * 3 * 3 * 8 * 8, cost.weights
    (True, 216)

    ```
    """
    check_inputs(example_inputs)
    batch = batch_of(example_inputs) or 1
    failure: Exception | None = None
    for inputs, count in [(examples(example_inputs), 1), (example_inputs, batch)][: min(batch, 2)]:
        try:
            return _counted(model, inputs).cost(count)
        except Exception as error:
            pass_on_exhaustion(error)
            failure = error
    assert failure is not None
    raise ModelError(f"{type(model).__name__} can't be run on the example inputs: {one_line(failure)}") from failure


def _counted(model: nn.Module, inputs: Any) -> Counting:
    counting = Counting(model)
    with preserved(model), random_state_preserved(model), torch.inference_mode(), counting:
        call(model, inputs)
    return counting


class Counting(WeightOps):
    """Counts what a model costs while it runs for another purpose: once, on one example, in inference mode.

    >>> model = nn.Linear(4, 2)
    >>> with torch.inference_mode(), Counting(model) as counting:
    ...     _ = model(torch.zeros(1, 4))
    >>> counting.cost().macs
    8
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, self._count)
        self._model = model
        self._activation_macs = 0
        # (tensor, kind) -> shape of the part that is used -> [its elements, how often each is used]
        self._uses: dict[tuple[str, str], dict[tuple[int, ...], list[int]]] = {}

    def cost(self, batch: int = 1) -> Cost:
        """The cost so far by example, of which `batch` were run, with the sizes that the model has now."""
        first = {id(tensor): (name, tensor) for name, tensor in reversed(list(named_tensors(self._model)))}
        tensors = dict(reversed(list(first.values())))
        shapes = {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, nn.Parameter)}
        layers = self._layers({name: tuple(tensor.shape) for name, tensor in tensors.items()}, batch)
        return Cost(
            macs=sum(layer.macs for layer in layers),
            parameters=sum(prod(shape) for shape in shapes.values()),
            weights=sum(prod(shapes[name]) for name in {layer.tensor for layer in layers} if name in shapes),
            layers=layers,
            activation_macs=-(-self._activation_macs // batch),
            shapes=shapes,
            uncounted=tuple(sorted(self.uncounted)),
        )

    def _count(self, use: WeightUse) -> None:
        if use.name is None:
            self._activation_macs += use.macs
            return
        # an expanded weight (stride 0) is one weight used more often
        sizes = zip(use.weight.shape, use.weight.stride(), strict=True)
        elements = prod(size for size, stride in sizes if stride or size == 1)
        parts = self._uses.setdefault((use.name, use.op.__name__), {})
        entry = parts.setdefault(tuple(use.weight.shape), [elements, 0])
        entry[1] += use.macs // max(1, elements)

    def _layers(self, shapes: Mapping[str, tuple[int, ...]], batch: int) -> tuple[LayerCost, ...]:
        """One entry per weight and kind; several where it is used in parts that don't make a whole."""
        layers: list[LayerCost] = []
        for (name, kind), parts in self._uses.items():
            module, whole = name.rpartition(".")[0], prod(shapes[name])
            macs = sum(elements * uses for elements, uses in parts.values())
            if whole and macs % whole == 0:
                parts = {shapes[name]: [whole, macs // whole]}
            for shape, (elements, total) in parts.items():
                uses = -(-total // batch)  # rounded up
                layers.append(LayerCost(module, kind, name, shape, elements * uses, elements, uses))
        return tuple(layers)
