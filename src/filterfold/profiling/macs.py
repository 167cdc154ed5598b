"""What a network costs: multiply-accumulates and parameters, layer by layer.

A MAC is one use of one weight, which is what Li et al. (2017) call a FLOP. The network runs once in
eval and inference mode, where every convolution and matrix product arrives at the dispatcher as one
op; the weight is known by following the parameters through what is computed from them, so
functional convolutions, standardised weights and shared layers are counted like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError
from ..utils.inputs import call, examples
from ..utils.model_state import attention_in_steps, preserved, random_state_preserved
from ..utils.modules import named_tensors

aten = torch.ops.aten


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


def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """Count multiply-accumulates and parameters of a model.

    **Arguments:**

    - `model`: any module; runs once in eval mode and is left as it was.
    - `example_inputs`: a tensor, a tuple of arguments or a mapping of keywords; the first axis is
      the batch, of which one example is used.

    **Returns:** the `Cost` of one example.

    **Raises:** `ModelError` if the model can't be run on the example.

    ```python
    >>> cost = measure(nn.Conv2d(3, 8, 3, bias=False), torch.zeros(1, 3, 10, 10))
    >>> cost.macs == 8 * 3 * 3 * 3 * 8 * 8, cost.weights
    (True, 216)

    ```
    """
    counting = Counting(model)
    with preserved(model), random_state_preserved(model), torch.inference_mode(), counting:
        try:
            call(model, examples(example_inputs))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{type(model).__name__} can't be run on one example of the inputs: {reason}") from error
    return counting.cost()


# --- which op multiplies which operand how often -------------------------------------------------

Use = tuple[Tensor, Tensor, int]
"""(data, weight, multiply-accumulates)."""


def _convolution(output: Tensor, data: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return data, weight, weight.numel() * (output.numel() // max(1, weight.shape[0]))


def _transposed(_output: Tensor, data: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return data, weight, weight.numel() * (data.numel() // max(1, weight.shape[0]))


def _linear(_output: Tensor, data: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return data, weight, weight.numel() * (data.numel() // max(1, weight.shape[-1]))


def _product(_output: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> Use:
    columns = right.shape[-1] if right.dim() > 1 else 1
    return left, right, left.numel() * columns


def _sum_product(output: Tensor, _sum: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> Use:
    return _product(output, left, right)


def _bilinear(output: Tensor, left: Tensor, _right: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return left, weight, weight.numel() * (output.numel() // max(1, weight.shape[0]))


def _attention(_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Use:
    heads = query.numel() // max(1, query.shape[-1])
    return query, key, heads * key.shape[-2] * (query.shape[-1] + value.shape[-1])


LAYERS: dict[Any, Callable[..., Use]] = {
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _transposed,
    aten.conv_transpose2d: _transposed,
    aten.conv_transpose3d: _transposed,
    aten.linear: _linear,
    aten.bilinear: _bilinear,
}
"""Ops with a weight of their own: counted whenever that comes from a parameter or buffer."""


PRODUCTS: dict[Any, Callable[..., Use]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.addmm: _sum_product,
    aten.baddbmm: _sum_product,
    aten.addmv: _sum_product,
    aten.scaled_dot_product_attention: _attention,
}
"""Products of two operands of equal standing: the weight is the one that comes from a parameter."""


IGNORED = {
    aten.cat,
    aten.stack,
    aten.embedding,
    aten.index,
    aten.index_put_,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten.native_batch_norm,
    aten.layer_norm,
    aten.group_norm,
    aten.batch_norm,
    aten.instance_norm,
    aten.copy_,
    aten.copy,
    aten.where,
    aten.addcmul,
    aten._prelu_kernel,
    aten.grid_sampler_2d,
    aten.expand_as,
    aten.view_as,
}
"""Ops that may read large parameters without a product per weight."""


WHOLE = {
    aten.batch_norm,
    aten.layer_norm,
    aten.group_norm,
    aten.instance_norm,
    aten.max_pool2d,
    aten.adaptive_avg_pool2d,
    aten.avg_pool2d,
    aten.dropout,
    aten.relu,
    aten.relu_,
    aten.relu6,
    aten.silu,
    aten.silu_,
    aten.hardtanh_,
    aten.hardswish,
    aten.hardswish_,
    aten.gelu,
    aten.sigmoid,
    aten.add,
    aten.add_,
    aten.mul,
    aten.cat,
    aten.mean,
    aten.flatten,
    aten.reshape,
    aten.view,
    aten.permute,
    aten.transpose,
    aten.contiguous,
    aten.chunk,
    aten.split,
}
"""Ops that often occur and hold no product: not worth the time to look into them."""


class WeightOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a model's ops and tells which parameter or buffer each product multiplies with.

    A tensor computed from parameters and buffers alone belongs to the one among them that has its
    shape, or to the largest. To be entered together with `torch.inference_mode()`.

    **Arguments:**

    - `model`: the model whose parameters and buffers are followed.
    - `seen`: called for every product as `seen(op, data, weight, name, macs, output)`; `op` is the
      op's packet (`torch.ops.aten.conv2d`), `name` is None where the weight is an activation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the default imports torch._dynamo (over a second)

    def __init__(self, model: nn.Module, seen: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uncounted: set[str] = set()
        self._seen = seen
        # id -> (tensor, name): holding the tensor keeps its id from being used again
        self._owners: dict[int, tuple[Tensor, str | None]] = {}
        for name, tensor in named_tensors(model):
            self._owners.setdefault(id(tensor), (tensor, name))
        self._attention = ExitStack()
        self._entered = 0

    def __enter__(self) -> Any:
        if self._entered == 0:
            self._attention.enter_context(attention_in_steps())
        self._entered += 1  # again for what an op is decomposed into
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._attention.close()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, report a product, and follow what is computed from parameters."""
        kwargs = kwargs or {}
        packet = func.overloadpacket
        rule = LAYERS.get(packet) or PRODUCTS.get(packet)
        if rule is None and packet not in WHOLE:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        output = func(*args, **kwargs)
        tensors = list(_tensors_in((*args, *kwargs.values())))
        owned = [self._owners[id(tensor)] for tensor in tensors if id(tensor) in self._owners]
        if rule is not None:
            self._report(packet, rule(output, *args, **kwargs), output)
        elif owned and len(owned) < len(tensors):
            self._note_uncounted(func, owned)
        if len(owned) == len(tensors):
            self._follow(output, owned)
        return output

    def _report(self, packet: Any, use: Use, output: Tensor) -> None:
        data, weight, macs = use
        name = self._name(weight)
        if packet in PRODUCTS:
            other = self._name(data)
            if name is not None and other is not None:
                return  # weights made from weights
            if name is None and other is not None:
                data, weight, name = weight, data, other
        self._seen(packet, data, weight, name, macs, output)

    def _name(self, tensor: Tensor) -> str | None:
        return self._owners.get(id(tensor), (tensor, None))[1]

    def _note_uncounted(self, func: Any, owned: list[tuple[Tensor, str | None]]) -> None:
        large = any(name is not None and tensor.squeeze().dim() > 1 for tensor, name in owned)
        if large and torch.Tag.pointwise not in func.tags and func.overloadpacket not in IGNORED:
            self.uncounted.add(str(func.overloadpacket))

    def _follow(self, output: Any, owned: list[tuple[Tensor, str | None]]) -> None:
        named = [(tensor, name) for tensor, name in owned if name is not None]
        for leaf in _tensors_in((output,)):
            if id(leaf) not in self._owners:
                alike = [entry for entry in named if entry[0].shape == leaf.shape]
                best = max(alike or named, key=lambda entry: entry[0].numel(), default=(leaf, None))
                self._owners[id(leaf)] = (leaf, best[1])


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among an op's arguments or results, which may be lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


class _Counter:
    """Adds up what `WeightOps` reports."""

    def __init__(self) -> None:
        self.macs: dict[tuple[str, str], dict[tuple[int, ...], list[int]]] = {}
        self.activation_macs = 0

    def count(self, op: Any, _data: Tensor, weight: Tensor, name: str | None, macs: int, _output: Tensor) -> None:
        if name is None:
            self.activation_macs += macs
            return
        # an expanded weight (stride 0) is one weight used more often
        elements = prod(n for n, stride in zip(weight.shape, weight.stride(), strict=True) if stride or n == 1)
        parts = self.macs.setdefault((name, op.__name__), {})
        entry = parts.setdefault(tuple(weight.shape), [elements, 0])
        entry[1] += macs // max(1, elements)

    def layers(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[LayerCost, ...]:
        """One entry per weight and kind; several where it is used in parts that don't make a whole."""
        layers: list[LayerCost] = []
        for (name, kind), parts in self.macs.items():
            module, whole = name.rpartition(".")[0], prod(shapes[name])
            macs = sum(elements * uses for elements, uses in parts.values())
            if whole and macs % whole == 0:
                layers.append(LayerCost(module, kind, name, shapes[name], macs, whole, macs // whole))
                continue
            layers += [LayerCost(module, kind, name, shape, n * uses, n, uses) for shape, (n, uses) in parts.items()]
        return tuple(layers)


class Counting(WeightOps):  # type: ignore[no-untyped-call]
    """Counts what a model costs while it runs for another purpose: once, on one example, in inference mode.

    >>> model = nn.Linear(4, 2)
    >>> with torch.inference_mode(), Counting(model) as counting:
    ...     _ = model(torch.zeros(1, 4))
    >>> counting.cost().macs
    8
    """

    def __init__(self, model: nn.Module) -> None:
        self._counter = _Counter()
        self._model = model
        super().__init__(model, self._counter.count)

    def cost(self) -> Cost:
        """The cost so far, with the sizes that the model has now."""
        model, counter = self._model, self._counter
        first = {id(tensor): (name, tensor) for name, tensor in reversed(list(named_tensors(model)))}
        tensors = dict(reversed(list(first.values())))
        shapes = {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, nn.Parameter)}
        layers = counter.layers({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return Cost(
            macs=sum(layer.macs for layer in layers),
            parameters=sum(prod(shape) for shape in shapes.values()),
            weights=sum(prod(shapes[name]) for name in {layer.tensor for layer in layers} if name in shapes),
            layers=layers,
            activation_macs=counter.activation_macs,
            shapes=shapes,
            uncounted=tuple(sorted(self.uncounted)),
        )
