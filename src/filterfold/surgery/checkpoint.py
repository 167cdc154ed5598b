"""Checkpoints of pruned models: safetensors with the structure and the plan as JSON in the header.

Nothing is executed on load: the sizes come from the header, the tensors from the file, the code from
the factory that the caller names.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..plan import Plan
from ..utils.arguments import check_device, typed
from ..utils.io import CHECKSUM, damage_told, read_safetensors, write_tensors
from ..utils.modules import in_memory_order, memory_order, named_tensors, refuse_script, unwrap
from ..utils.snapshot import Snapshot
from .layer_attributes import restore, snapshot

FORMAT = "1"


_LOG = logging.getLogger("filterfold.surgery")


_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    **Arguments:**

    - `plans`: the plans that were applied, first to last.
    - `metadata`: what was passed to `save`.
    - `shapes`: name → shape of every tensor in the file.
    """

    plans: tuple[Plan, ...]
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


@typed
def save(
    model: nn.Module,
    path: str | Path,
    *,
    plan: Plan | Sequence[Plan] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, pruned or not, so that `load` gives back the same outputs, bit for bit.

    Stored are all parameters and buffers (those that are not persistent, too), tied ones once, with
    their type and order in memory. The write is atomic.

    **Arguments:**

    - `model`: bare, or in the wrappers that `apply` knows.
    - `path`: the file, by habit `something.safetensors`; replaced if it exists.
    - `plan`: the plan or plans that led here, kept for the record; loading does not need them.
    - `metadata`: JSON-able remarks.

    **Raises:** `CheckpointError` if the model has state that is no tensor, or metadata is not JSON-able.

    ```python
    >>> import tempfile
    >>> net, folder = nn.Conv2d(3, 2, 1), Path(tempfile.mkdtemp())
    >>> save(net, folder / "small.safetensors", metadata={"top1": 93.4})
    >>> load(folder / "small.safetensors", lambda: nn.Conv2d(3, 8, 1)).weight.equal(net.weight)
    True
    >>> inspect(folder / "small.safetensors").metadata
    {'top1': 93.4}

    ```
    """
    write(contents(model, plan=plan, metadata=metadata, path=path), path)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds: tensors by name, and the rest as JSON."""

    tensors: dict[str, Tensor]
    header: dict[str, str]


def write(found: Contents, path: str | Path) -> None:
    """Write what `contents` found, atomically."""
    write_tensors(Path(path), found.tensors, found.header)


def contents(
    model: nn.Module, *, plan: Plan | Sequence[Plan] | None, metadata: Mapping[str, Any] | None, path: str | Path
) -> Contents:
    """What `save` writes to `path`, which is named in errors."""
    model = unwrap(model)
    refuse_script(model)
    _refuse_extra_state(model)
    plans = [plan] if isinstance(plan, Plan) else list(plan or ())
    tensors, aliases, orders = _collect(model)
    try:
        header = {
            "filterfold": FORMAT,
            "structure": json.dumps(snapshot(model)),
            "plans": json.dumps([json.loads(entry.to_json()) for entry in plans]),
            "aliases": json.dumps(aliases),
            "orders": json.dumps(orders),
            "metadata": json.dumps(dict(metadata or {})),
        }
    except TypeError as error:
        raise CheckpointError(f"{path}: plan notes and metadata must be JSON-able: {error}") from error
    return Contents(tensors, header)


@typed
def load(
    path: str | Path, factory: Callable[[], nn.Module] | nn.Module, *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Build a model and give it the sizes and values of a checkpoint.

    **Arguments:**

    - `path`: a file written by `save`.
    - `factory`: a callable that returns the model as it was before pruning, or such a model, which is
      then changed in place.
    - `device`: where the model goes.

    **Returns:** the model, in the mode that the factory left it in.

    **Raises:** `CheckpointError` if the file is missing, truncated, a pickle, or does not fit the model,
    naming what doesn't; a model that was passed in is then as before.
    """
    path = Path(path)
    check_device(device)
    _refuse_pickle(path)
    header, tensors = read_safetensors(path)
    if CHECKSUM not in header:
        _LOG.info("%s has no checksum, as earlier versions wrote it: damage to its tensors would not be told", path)
    model = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the factory returned a {type(model).__name__}, not a module")
    rebuild(unwrap(model), path, header, tensors)
    return model.to(device)


def rebuild(
    target: nn.Module, path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor], head: str | None = None
) -> None:
    """Give a bare model the sizes and values of what `read_safetensors` read from a file that `save` wrote.

    **Arguments:** `head`: name of the module that keeps its own number of outputs, and is drawn anew.
    """
    structure, aliases, orders = (read_header(path, header, key) for key in ("structure", "aliases", "orders"))
    if any(tensor.is_meta for _, tensor in named_tensors(target)):
        raise CheckpointError("the factory built a model without data (on the meta device): build it on a real one")
    with damage_told(path, "damaged header"):
        first = {name: aliases.get(name, name) for name in structure["tensors"]}
        values = _checked_values(path, structure, {name: tensors.get(first[name]) for name in first})
        for name in first:
            if first[name] in orders:
                values[name] = in_memory_order(values[name], orders[first[name]])
        if head is not None:
            structure = _with_head_of(target, head, structure)
    before, data = Snapshot([target]), [(tensor, tensor.data, tensor.grad) for _, tensor in named_tensors(target)]
    try:
        with damage_told(path, "damaged header"):
            restore(target, structure)
            for name, tensor in named_tensors(target):
                if name.rpartition(".")[0] != head:
                    tensor.data = values[name].to(tensor.device)
    except CheckpointError as error:
        before.give_back()
        for tensor, old, grad in data:
            tensor.grad = None
            tensor.data, tensor.grad = old, grad
        raise CheckpointError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    if head is not None:
        draw(target.get_submodule(head))


def draw(head: nn.Module) -> None:
    """Draw a new classifier on trained features, as PyTorch draws such layers, within ±1/√inputs, if it can.

    What a network's own code draws may be far larger (timm's EfficientNet: within ±1/√outputs), and then hardly trains
    in few epochs: 43 instead of 23 % top-1 after 3 epochs on 500 images of CIFAR-10 (EfficientNet-Lite0, 64 pixels,
    mean of 2 seeds and 2 rates).
    """
    if callable(reset := getattr(head, "reset_parameters", None)):
        reset()


def _with_head_of(model: nn.Module, head: str, structure: Mapping[str, Any]) -> dict[str, Any]:
    """A file's structure in which a layer has as many outputs as in the model."""
    layer = model.get_submodule(head)
    kind, sizes = structure["modules"][head]
    outputs = {name: value for name, value in vars(layer).items() if name in ("out_features", "out_channels")}
    tensors = {
        name: [[tensor.shape[0], *structure["tensors"][name][0][1:]], structure["tensors"][name][1]]
        for name, tensor in named_tensors(model)
        if name.rpartition(".")[0] == head
    }
    return {
        "modules": {**structure["modules"], head: [kind, {**sizes, **outputs}]},
        "tensors": {**structure["tensors"], **tensors},
    }


def inspect(path: str | Path) -> CheckpointInfo:
    """What a checkpoint written by `save` says about itself. Raises `CheckpointError` if it is none."""
    path = Path(path)
    _refuse_pickle(path)
    header, _ = read_safetensors(path)
    structure, plans, metadata = (read_header(path, header, key) for key in ("structure", "plans", "metadata"))
    with damage_told(path, "damaged header"):
        read = tuple(Plan.from_json(json.dumps(plan)) for plan in plans)
        shapes = {name: tuple(shape) for name, (shape, _) in structure["tensors"].items()}
        return CheckpointInfo(read, dict(metadata), shapes)


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[int]]]:
    """(tensors by first name, other name → first name, first name → order of axes in memory where unusual)."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    orders: dict[str, list[int]] = {}
    for name, tensor in named_tensors(model):
        if id(tensor) in first:
            if first[id(tensor)] != name:
                aliases[name] = first[id(tensor)]
            continue
        if isinstance(tensor, nn.UninitializedParameter) or tensor.is_meta or tensor.layout != torch.strided:
            raise CheckpointError(f"{name} is not an ordinary dense tensor with data and can't be saved")
        first[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        order = memory_order(tensor)
        if order != sorted(order):
            orders[name] = order
    return tensors, aliases, orders


def _checked_values(path: Path, structure: Mapping[str, Any], values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The values, all there and of the shapes and types that the structure says."""
    found = {}
    for name, value in values.items():
        shape, kind = structure["tensors"][name]
        if value is None:
            raise CheckpointError(f"{path}: tensor {name!r} is missing from the file")
        if list(value.shape) != shape or str(value.dtype) != f"torch.{kind}":
            raise CheckpointError(
                f"{path}: tensor {name!r} is {tuple(value.shape)} {value.dtype}, its header says {tuple(shape)} {kind}"
            )
        found[name] = value
    return found


def read_header(path: Path, header: Mapping[str, str], key: str) -> Any:
    """An entry of the header that `save` wrote. Raises `CheckpointError` for a file of anything else."""
    if "filterfold" not in header:
        raise CheckpointError(f"{path}: a safetensors file without Filterfold's structure: use load_weights()")
    if header["filterfold"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {header['filterfold']!r}, this version reads {FORMAT!r}")
    try:
        return json.loads(header[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {key!r} is missing or no JSON") from error


def is_pickle(path: Path) -> bool:
    """Whether a file is one of `torch.save`. Raises `CheckpointError` if there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    length_and_brace = start[4:] == b"\0\0\0\0{"  # safetensors: a header of 640 bytes begins like a pickle
    return start.startswith(_PICKLES) and not length_and_brace


def _refuse_pickle(path: Path) -> None:
    if is_pickle(path):
        raise CheckpointError(f"{path}: a pickle (torch.save), which load() never opens: use load_weights()")


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"module {name!r} ({type(module).__name__}) has extra state, which can't be saved")
