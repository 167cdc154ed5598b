"""Clocks, and the conditions under which they run."""

from __future__ import annotations

import os
import platform
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

Timer = Callable[[Callable[[], Any], int], float]
"""Runs something so many times and gives the seconds in all."""


def timer_for(device: torch.device) -> Timer:
    """The clock of a device: events on a GPU; elsewhere wall time, with the garbage collector off.

    The latter is `timeit.Timer`, as in `torch.utils.benchmark`, whose further help (warm-up, threads,
    blocks) `measure_latency` gives to several networks in turn.
    """

    def on_cpu(run: Callable[[], Any], times: int) -> float:
        return timeit.Timer(run).timeit(times)

    def on_cuda(run: Callable[[], Any], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3

    return on_cuda if device.type == "cuda" else on_cpu


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Let PyTorch compute with so many CPU threads for the length of a `with` block; None: leave it."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and data type of a model's first floating-point parameter.

    >>> place_of(nn.Linear(1, 1))
    (device(type='cpu'), torch.float32)
    """
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return tensor.device, tensor.dtype


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware_name(device: torch.device) -> str:
    """The name of the GPU or of the CPU: what a cached time belongs to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def load_average() -> float | None:
    """Processes that want to run, over the last minute; None where the system doesn't say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
