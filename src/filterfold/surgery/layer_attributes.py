"""Sizes that layers keep beside their weights: read from a cut layer, recorded, and set again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import CheckpointError, SurgeryError, one_line
from ..utils.modules import like, named_tensors, unwrap
from ..utils.size_slots import GRAPH, plain_sizes, set_slot, size_slots


def shape_of(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """The present shape of a layer's tensor, also where the tensor is made anew at every forward.

    The old-style hooks of `torch.nn.utils` (weight norm, spectral norm, pruning masks) leave a stale
    `weight` behind and keep the truth in `weight_v` or `weight_orig`.

    >>> shape_of(nn.Linear(3, 2), "weight")
    (2, 3)
    """
    for candidate in (f"{name}_v", f"{name}_orig"):
        kept = module._parameters.get(candidate)
        if kept is not None:
            return tuple(kept.shape)
    with torch.no_grad():
        tensor = getattr(module, name, None)
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


@singledispatch
def refresh_attributes(module: nn.Module) -> None:
    """Set a layer's size attributes from the present shapes of its tensors.

    A registry by layer type: subclasses follow their base class; a type without a rule has no
    attributes to refresh. Add one with `@refresh_attributes.register`.

    **Raises:** `SurgeryError` if the shapes fit no layer of that type.

    >>> layer = nn.Linear(3, 2)
    >>> layer.weight.data = layer.weight.data[:, :1]
    >>> refresh_attributes(layer); layer
    Linear(in_features=1, out_features=2, bias=True)
    """


@refresh_attributes.register
def _convolution(module: _ConvNd) -> None:
    """Grouped convolutions keep their groups, except depthwise ones: one group for each input channel."""
    shape = shape_of(module, "weight")
    if shape is None or isinstance(module.weight, nn.UninitializedParameter):
        return
    rows, columns = shape[:2]
    groups = module.groups
    depthwise = groups == module.in_channels and groups > 1
    if isinstance(module, _ConvTransposeNd):
        groups = rows if depthwise else groups
        inputs, outputs = rows, columns * groups
    else:
        if depthwise:
            multiplier = module.out_channels // groups
            groups = rows // multiplier
        inputs, outputs = columns * groups, rows
    if groups == 0 or inputs % groups or outputs % groups:
        raise SurgeryError(
            f"{type(module).__name__}: {inputs} inputs and {outputs} outputs don't divide into {groups} groups"
        )
    module.in_channels, module.out_channels, module.groups = inputs, outputs, groups


@refresh_attributes.register
def _linear(module: nn.Linear) -> None:
    shape = shape_of(module, "weight")
    if shape is not None:
        module.out_features, module.in_features = shape


@refresh_attributes.register
def _bilinear(module: nn.Bilinear) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


@refresh_attributes.register
def _batch_or_instance_norm(module: _NormBase) -> None:
    shape = shape_of(module, "weight") or shape_of(module, "running_mean")
    if shape is not None:
        module.num_features = shape[0]


@refresh_attributes.register
def _group_norm(module: nn.GroupNorm) -> None:
    shape = shape_of(module, "weight")
    if shape is None:
        return
    if module.num_groups == module.num_channels:  # an instance norm by another name
        module.num_groups = shape[0]
    if shape[0] % module.num_groups:
        raise SurgeryError(
            f"{type(module).__name__}: {shape[0]} channels don't divide into its {module.num_groups} groups; "
            "keep the same number in every group"
        )
    module.num_channels = shape[0]


@refresh_attributes.register(nn.LayerNorm)
@refresh_attributes.register(nn.RMSNorm)
def _layer_norm(module: nn.LayerNorm | nn.RMSNorm) -> None:
    shape = shape_of(module, "weight")
    if shape is not None:
        module.normalized_shape = shape


@refresh_attributes.register
def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = module.weight.numel()


@refresh_attributes.register
def _embedding(module: nn.Embedding) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


@refresh_attributes.register
def _recurrent(module: nn.RNNBase) -> None:
    """What it reads can shrink, its states can't."""
    tensors = dict(module.named_parameters(recurse=False))
    rows = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) * module.hidden_size
    if any(tensor.shape[0] != rows for name, tensor in tensors.items() if "_ih_" in name):
        _refused(module)
    module.input_size = tensors["weight_ih_l0"].shape[1]
    if tensors["weight_ih_l0"].is_cuda:
        module.flatten_parameters()


@refresh_attributes.register
def _recurrent_cell(module: nn.RNNCellBase) -> None:
    module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


@refresh_attributes.register
def _attention(module: nn.MultiheadAttention) -> None:
    """Only what reads keys and values of sizes of their own can shrink."""
    tensors, size = dict(module.named_parameters(recurse=False)), module.embed_dim
    columns = {"kdim": tensors.pop("k_proj_weight", None), "vdim": tensors.pop("v_proj_weight", None)}
    rows = [tensor.shape[0] for tensor in columns.values() if tensor is not None]
    if {*rows, *(length for tensor in tensors.values() for length in tensor.shape)} - {1, size, 3 * size}:
        _refused(module)
    for name, tensor in columns.items():
        if tensor is not None:
            setattr(module, name, tensor.shape[1])


@refresh_attributes.register(nn.EmbeddingBag)
def _refused(module: nn.Module) -> None:
    raise SurgeryError(f"{type(module).__name__} can't be cut: its sizes are coupled in ways that no rule knows")


_NEVER_CUT = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding"})
"""Sizes that are no numbers of channels: a checkpoint in which they differ is damaged, or of another network."""


_CHANNELS = {
    _ConvNd: "out_channels",
    nn.Linear: "out_features",
    _NormBase: "num_features",
    nn.GroupNorm: "num_channels",
}


def check_lengths(module: nn.Module) -> None:
    """Refuse a layer of which some tensors have entries for other channels than its weight.

    >>> layer = nn.Linear(3, 2)
    >>> layer.bias.data = torch.zeros(3)
    >>> try: check_lengths(layer)
    ... except SurgeryError as error: print(error)
    Linear: bias has 3 entries for 2 channels
    """
    for kind, attribute in _CHANNELS.items():
        for name in ("bias", "running_mean", "running_var") if isinstance(module, kind) else ():
            shape, channels = shape_of(module, name), getattr(module, attribute)
            if shape and len(shape) == 1 and shape[0] != channels:
                raise SurgeryError(f"{type(module).__name__}: {name} has {shape[0]} entries for {channels} channels")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The sizes of a model, as a JSON-able dictionary that `restore` understands.

    **Returns:** `{"modules": {name: [class name, {attribute: int or nested list}]}, "tensors": {name: [shape,
    dtype]}}`; the root module's name is "".

    >>> snapshot(nn.ReLU())
    {'modules': {'': ['torch.nn.modules.activation.ReLU', {}]}, 'tensors': {}}
    """
    model = unwrap(model)
    seen: set[int] = set()
    modules = {
        name: [_class_name(module), {key: _as_lists(plain_sizes(value)) for key, value in slots.items()}]
        for name, module in model.named_modules(remove_duplicate=False)
        if (slots := size_slots(module, seen)) is not None
    }
    tensors = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in named_tensors(model)}
    return {"modules": modules, "tensors": tensors}


def restore(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Give a model the sizes of a snapshot, in place; what is in resized tensors is undefined afterwards.

    Parameters keep their identity and `requires_grad`; nothing is executed.

    **Arguments:**

    - `model`: a freshly built model of the same architecture, usually the dense one.
    - `structure`: from `snapshot`.

    **Raises:** `CheckpointError` naming the module, attribute or tensor that doesn't fit; the model is
    then untouched.

    >>> small, dense = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 8, 1)
    >>> restore(dense, snapshot(small)); dense
    Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1))
    """
    model = unwrap(model)
    try:
        attributes = list(_changed_attributes(model, structure["modules"]))
        tensors = list(_changed_tensors(model, structure["tensors"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"damaged structure record: {one_line(error)}") from error
    for tensor, shape, dtype in tensors:
        tensor.grad = None
        tensor.data = torch.zeros(shape, dtype=dtype, device=tensor.device)
    for module, name, value in attributes:
        set_slot(module, name, value)


def _changed_attributes(model: nn.Module, recorded: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    _same_names("module", modules, recorded)
    for where, (class_name, sizes) in recorded.items():
        module = modules[where]
        # A script's classes live in "__main__" when saving and in a named module when loading.
        if class_name.rpartition(".")[2] != _class_name(module).rpartition(".")[2]:
            raise CheckpointError(f"module {where!r} is a {_class_name(module)}, but the checkpoint has a {class_name}")
        present = size_slots(module)
        for name, value in sizes.items():
            new = plain_sizes(value)
            if "." in name and name not in present and not name.startswith(GRAPH):
                continue  # of a configuration that is shorter by now; no size that the network needs
            if name not in present or new is None:
                raise CheckpointError(f"module {where!r} ({_class_name(module)}) has no size {name!r} to set")
            old = plain_sizes(present[name])
            if _form(old) != _form(new) or (old != new and name in _NEVER_CUT):
                raise CheckpointError(
                    f"module {where!r} ({_class_name(module)}) has {name}={old} in the model, {new} in the checkpoint"
                )
            if old != new:
                yield module, name, like(present[name], new)


def _changed_tensors(
    model: nn.Module, recorded: Mapping[str, Any]
) -> Iterator[tuple[Tensor, tuple[int, ...], torch.dtype]]:
    tensors = dict(named_tensors(model))
    _same_names("tensor", tensors, recorded)
    for name, (sizes, dtype_name) in recorded.items():
        shape, dtype = tuple(sizes), getattr(torch, dtype_name)
        if len(shape) != tensors[name].dim():
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(tensors[name].shape)} in the model, {shape} in the checkpoint"
            )
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
            yield tensors[name], shape, dtype


def _same_names(kind: str, model: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    missing, unknown = sorted(set(model) - set(recorded)), sorted(set(recorded) - set(model))
    if missing or unknown:
        name, where = (unknown[0], "model") if unknown else (missing[0], "checkpoint")
        more = len(missing) + len(unknown) - 1
        rest = f" (and {more} more names that differ)" if more else ""
        raise CheckpointError(f"the {where} has no {kind} {name!r}{rest}: was it saved from another architecture?")


def _form(sizes: Any) -> Any:
    return tuple(map(_form, sizes)) if isinstance(sizes, tuple) else None


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
