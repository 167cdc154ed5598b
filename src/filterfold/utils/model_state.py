"""Giving a model back as it was, and the random state with it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .modules import named_tensors
from .snapshot import Snapshot

TINY = 1e-3
"""Parameters below this hide what they scale: float32 outputs agree to 1e-4 whatever lies behind them."""


ONE_AT_A_TIME = threading.RLock()
"""Held by a thread while it has changed what all threads share: random state, switches of PyTorch."""


@contextmanager
def preserved(
    *models: nn.Module, dtype: torch.dtype | None = None, generic: bool = False
) -> Iterator[Callable[[], Iterator[Tensor]]]:
    """Put models into eval mode, and give each back as it was.

    Given back are every module's mode, attributes, children and hooks, the content of its lists and dictionaries,
    which tensors it holds, and their gradients (see `Snapshot`). Some networks cache what they compute from their
    weights (attention biases in LeViT) and clear it in their own `train()`: left behind, a cache would be used after
    the weights changed. Others install hooks at their first call and note in a flag that they did. What is written
    into a tensor inside stays, unless `dtype` or `generic` is given.

    **Arguments:**

    - `models`: the models.
    - `dtype`: if given, all floating-point parameters and buffers have this type inside.
    - `generic`: if true, constant and tiny parameters get seeded random values inside.

    **Yields:** a function that lists the tensors that modules have put into their own lists and dictionaries so far.

    >>> class Caching(nn.Module):
    ...     def forward(self, x):
    ...         self.cache = x
    >>> net = nn.Sequential(Caching(), nn.Dropout().eval())
    >>> with preserved(net):
    ...     _ = net[0](1)
    ...     net.training, net[0].cache
    (False, 1)
    >>> net.training, net[1].training, hasattr(net[0], "cache")
    (True, False, False)
    >>> net = nn.BatchNorm2d(4)
    >>> with preserved(net, dtype=torch.float64, generic=True):
    ...     net.weight.dtype, bool(net.weight.std() > 0)
    (torch.float64, True)
    >>> net.weight.tolist(), net.weight.dtype
    ([1.0, 1.0, 1.0, 1.0], torch.float32)
    """
    snapshot = Snapshot(models)
    tensors = {id(tensor): (name, tensor) for model in models for name, tensor in named_tensors(model)}
    gradients = [(tensor, tensor.grad) for _, tensor in tensors.values() if tensor.is_leaf]
    data = [(tensor, tensor.data) for _, tensor in tensors.values()] if dtype is not None or generic else []

    try:
        for model in models:
            to_eval_mode(model)
        if data:
            _replace_data(tensors.values(), dtype, generic)
        yield snapshot.added
    finally:
        for tensor, old in data:
            tensor.grad = None  # of another type or size, it would forbid the old data
            tensor.data = old
        for tensor, gradient in gradients:
            if tensor.grad is not gradient:
                tensor.grad = gradient
        snapshot.give_back()


def to_eval_mode(model: nn.Module) -> None:
    """Evaluation mode, also of a program made by `torch.export`, which has none and stays what it was exported as."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False


@contextmanager
def buffers_preserved(model: nn.Module) -> Iterator[None]:
    """Give the values of a model's buffers back: counters and averages that it keeps while it runs.

    >>> net = nn.BatchNorm1d(2)
    >>> with buffers_preserved(net):
    ...     _ = net(torch.randn(3, 2))
    >>> net.num_batches_tracked.item()
    0
    """
    saved = [
        (buffer, buffer._version, buffer.clone())
        for module in model.modules()
        if module._buffers and (module.training or not isinstance(module, nn.modules.batchnorm._NormBase))
        for buffer in module._buffers.values()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in saved:
                if buffer._version != version:
                    buffer.copy_(value)


def _replace_data(named: Any, dtype: torch.dtype | None, generic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in named:
        if tensor.is_leaf:
            tensor.grad = None
        if tensor.is_floating_point():
            data = _generic(name, tensor, generator) if generic else tensor.data
            tensor.data = data if dtype is None else data.to(dtype)


def _generic(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor's data, or random data where it is constant or tiny."""
    data = tensor.data
    kind = name.rpartition(".")[2]
    if data.numel() == 0 or not (isinstance(tensor, nn.Parameter) or kind in ("running_mean", "running_var")):
        return data
    vector = data.numel() == max(data.shape, default=1)
    first, last = data[(0,) * data.dim()], data[(-1,) * data.dim()]
    if bool(first != last) and not (vector and abs(float(first)) < TINY):
        return data  # neither constant nor tiny, and that without a look at all of it
    low, high = (float(bound) for bound in torch.aminmax(data))
    constant, size = low == high and data.numel() > 1, max(abs(low), abs(high))

    def uniform(start: float, end: float) -> Tensor:
        return torch.empty(data.shape).uniform_(start, end, generator=generator).to(data)

    if vector and size < TINY and kind != "running_var":
        return uniform(0.1, 0.5)
    if constant and size >= TINY:
        return data * uniform(0.75, 1.25)
    if constant and not vector:
        inputs = data[0].numel()
        noise: Tensor = torch.randn(data.shape, generator=generator) / inputs**0.5
        return noise.to(data)
    return data


@contextmanager
def random_state_preserved(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Give back the random state of Python, NumPy and PyTorch, on the CPU and on the model's GPUs.

    **Arguments:**

    - `model`: says which GPUs are meant.
    - `seed`: if given, PyTorch's generators start from it inside.

    >>> _ = torch.manual_seed(0); first = torch.rand(1); _ = torch.manual_seed(0)
    >>> with random_state_preserved(nn.Identity(), seed=3):
    ...     second = torch.rand(1)
    >>> bool(torch.rand(1) == first), bool(first == second)
    (True, False)
    """
    devices = _devices(model)
    with ONE_AT_A_TIME:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global state is the user's
        try:
            with torch.random.fork_rng(devices=devices):
                # Not torch.manual_seed, which would seed every device there is.
                for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                    if seed is not None:
                        generator.manual_seed(seed)
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def random_states(model: nn.Module) -> list[Tensor]:
    """The states of PyTorch's generators, on the CPU and on the model's GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(model))]


def _devices(model: nn.Module) -> list[int]:
    """The GPUs that a model lies on."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return sorted({tensor.device.index for _, tensor in named_tensors(model) if tensor.device.type == "cuda"})
