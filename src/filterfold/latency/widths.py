"""Widths that the hardware likes, and widths that waste what they saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..modes import undisturbed
from .clock import Timer, place_of, threads_set
from .layers import LayerCall, LayerTimes, layer_calls

_VECTOR = 16
"""Channels in one block of the CPU's convolutions: 512 bits of float32 (oneDNN's nChw16c format)."""

_TENSOR_CORE = 8
"""Multiples that tensor cores want in half precision (NVIDIA, Deep Learning Performance Guide)."""

_FASTER = 1.02
"""Narrower layers must be this much faster than rounded-up ones to be worth their odd width."""


def friendly_step(size: int, device: torch.device) -> int:
    """Multiples of how many channels the hardware likes, fine enough to choose among for `size` channels.

    >>> [friendly_step(size, torch.device("cpu")) for size in (512, 64, 40, 16, 3)]
    [16, 16, 8, 4, 1]
    """
    step = _TENSOR_CORE if device.type == "cuda" else _VECTOR
    while step > 1 and step * 4 > size:
        step //= 2
    return step


def wasted_widths(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_size: int = 64,
    threads: int | None = None,
    times: LayerTimes | None = None,
    timer: Timer | None = None,
) -> tuple[str, ...]:
    """Layers whose odd widths save nothing: rounded up to what the hardware likes they are as fast.

    Every convolution and linear layer is timed at its widths and at those rounded up to a multiple of
    16 (8 on a GPU), in turn.

    **Arguments:**

    - `model`, `example_inputs`: as for `measure_latency`.
    - `batch_size`, `threads`, `timer`: likewise.
    - `times`: the table to measure with; None: one that is kept nowhere.

    **Returns:** one sentence for each layer that wastes width.

    ```python
    >>> def by_vectors(run, count):
    ...     return count * 1.0  # all calls take as long: no width saves anything
    >>> print(*wasted_widths(nn.Linear(32, 30), torch.zeros(1, 32), timer=by_vectors))
    weight: 32 -> 30 channels take 1000 ms, 32 -> 32 would take 1000 ms

    ```
    """
    device, dtype = place_of(model)
    found = []
    with threads_set(threads), undisturbed(model):
        times = times or LayerTimes(device, dtype, batch_size, timer=timer, folder=False)
        for layer in dict.fromkeys(layer_calls(model, example_inputs)):
            rounded = _rounded_up(layer, _TENSOR_CORE if device.type == "cuda" else _VECTOR)
            if rounded.weight == layer.weight:
                continue
            mine, theirs = times.compare(layer, rounded)
            if mine * _FASTER > theirs:
                found.append(
                    f"{layer.tensor.removesuffix('.weight')}: {_widths(layer)} channels take {1e3 * mine:.4g} ms, "
                    f"{_widths(rounded)} would take {1e3 * theirs:.4g} ms"
                )
    return tuple(found)


def _rounded_up(layer: LayerCall, step: int) -> LayerCall:
    """With both widths at multiples; widths below one multiple (images, classes) stay."""
    if layer.groups > 1:
        return layer
    out, into = (width if width < step else -(-width // step) * step for width in layer.weight[:2])
    return layer.at((out, into, *layer.weight[2:]))


def _widths(layer: LayerCall) -> str:
    out, into = layer.weight[layer.out_axis], layer.weight[1 - layer.out_axis]
    return f"{into} -> {out}"
