"""The ways to run a network: plainly, in another memory format, compiled, or in ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConfigError
from ..modes import call
from .clock import place_of

Mode = Literal["eager", "channels_last", "compile", "onnxruntime"]
MODES: tuple[Mode, ...] = get_args(Mode)

Runner = Callable[[Any], Callable[[], Any]]
"""Takes a batch on the device, gives what runs the network on it once."""


def prepare(model: nn.Module, mode: Mode, example: Any) -> Runner:
    """Make a network ready to be timed in a mode; the network itself is not changed.

    **Arguments:**

    - `model`: in eval mode.
    - `mode`: one of `MODES`. `channels_last` copies the model; `onnxruntime` exports it (CPU only,
      with as many threads as PyTorch has set).
    - `example`: one example on the model's device.

    **Raises:** `ConfigError` for an unknown mode or one that the device can't have; `ExportError`.
    """
    if mode == "eager":
        return lambda batch: partial(call, model, batch)
    if mode == "channels_last":
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda batch: partial(call, twin, tree_map(channels_last, batch))
    if mode == "compile":
        compiled = cast(nn.Module, torch.compile(model, dynamic=False))
        return lambda batch: partial(call, compiled, batch)
    if mode == "onnxruntime":
        return _session(model, example)
    raise ConfigError(f"mode={mode!r}: must be one of {', '.join(MODES)}")


def compiling(mode: Mode) -> AbstractContextManager[Any]:
    """Room for one compiled version a batch size and network: beyond a limit PyTorch silently runs eagerly."""
    if mode != "compile":
        return nullcontext()
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024)  # type: ignore[no-any-return]


def channels_last(value: Any) -> Any:
    """An image batch in channels-last format; anything else as it is."""
    image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if image else value


def _session(model: nn.Module, example: Any) -> Runner:
    device, _ = place_of(model)
    if device.type != "cpu":
        raise ConfigError(f"mode='onnxruntime' is timed on the CPU; move the networks from {device} to it")
    from ..export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        to_onnx(model, example, file, check=False)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def runner(batch: Any) -> Callable[[], Any]:
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return partial(session.run, None, feed)

    return runner
