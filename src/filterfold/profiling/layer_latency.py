"""Time of single layers at other widths, and widths at which the hardware is efficient."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..utils.inputs import call, examples
from ..utils.io import write_json
from ..utils.model_state import preserved, random_state_preserved
from ..utils.progress import track
from .latency import Timer, hardware_name, place_of, threads_set, timer_for
from .weight_ops import WeightOps, WeightUse

_LOG = logging.getLogger("filterfold.profiling")


_FORMAT = 1


_REPEATS = 5


_BLOCK_SECONDS = 0.004
"""A layer's time is the smallest of 5 blocks of about 4 ms: other work on the machine only adds."""


Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One use of one weight by a convolution or linear op, for one example.

    **Arguments:**

    - `tensor`: qualified name of the weight.
    - `op`: the op's name, such as `conv2d`, `conv_transpose2d`, `linear`.
    - `data`, `weight`: shapes of the op's input (one example) and weight.
    - `bias`: whether there is one.
    - `options`: the op's other arguments: stride, padding, groups, ….
    """

    tensor: str
    op: str
    data: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    options: Options

    @property
    def out_axis(self) -> int:
        """The weight's axis along which outputs run."""
        return int("transpose" in self.op)

    @property
    def groups(self) -> int:
        """Groups of a grouped convolution."""
        return int(dict(self.options).get("groups", 1))

    def at(self, weight: tuple[int, ...]) -> LayerCall:
        """The same call with a weight of another size, and with the input that it then needs.

        >>> wide = LayerCall("c.weight", "conv2d", (1, 8, 4, 4), (16, 8, 3, 3), False, (("groups", 1),))
        >>> wide.at((4, 2, 3, 3)).data
        (1, 2, 4, 4)
        """
        if self.op == "linear":
            return replace(self, weight=weight, data=(*self.data[:-1], weight[1]))
        groups, options = self.groups, self.options
        if groups > 1 and self.weight[1] == 1:  # depthwise: groups go with the channels
            groups = max(1, groups * weight[0] // self.weight[0])
            options = tuple((name, groups if name == "groups" else value) for name, value in options)
        channels = weight[0] if self.out_axis else weight[1] * groups
        return replace(self, weight=weight, data=(self.data[0], channels, *self.data[2:]), options=options)


def layer_calls(model: nn.Module, example_inputs: Any) -> tuple[LayerCall, ...]:
    """The convolutions and linear layers that a model calls, in order.

    Ops on derived weights or on parts of a weight are left out.

    **Arguments:**

    - `model`: runs once in eval mode on one example and is left as it was.
    - `example_inputs`: a tensor, a tuple of arguments or a mapping of keywords.

    ```python
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> [(call.tensor, call.op, call.data) for call in layer_calls(net, torch.zeros(4, 3, 3, 3))]
    [('0.weight', 'conv2d', (1, 3, 3, 3)), ('2.weight', 'linear', (1, 8))]

    ```
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    calls: list[LayerCall] = []

    def note(use: WeightUse) -> None:
        op, name = use.op.__name__, use.name or ""
        if (op == "linear" or op.startswith("conv")) and tuple(use.weight.shape) == shapes.get(name):
            arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in use.arguments.items()}
            options = tuple(item for item in arguments.items() if item[0] not in ("input", "weight", "bias"))
            bias = arguments["bias"] is not None
            calls.append(LayerCall(name, op, tuple(use.data.shape), tuple(use.weight.shape), bias, options))

    with preserved(model), random_state_preserved(model), torch.inference_mode(), WeightOps(model, note):
        call(model, examples(example_inputs))
    return tuple(calls)


class LayerTimes:
    """Seconds of layer calls on one device at one batch size: each is measured once, and kept on disk.

    **Arguments:**

    - `device`, `dtype`: where and in what the layers compute.
    - `batch_size`: examples per call.
    - `channels_last`: memory format of images and convolution weights.
    - `timer`: as in `measure_latency`.
    - `folder`: where tables are kept, one file for each hardware, number of threads, data type and version of
      PyTorch; None: `$FILTERFOLD_CACHE/latency` or `~/.cache/filterfold/latency`; False: nowhere.

    ```python
    >>> times = LayerTimes(torch.device("cpu"), torch.float32, 4, timer=lambda run, count: 0.5 * count, folder=False)
    >>> times.seconds(LayerCall("0.weight", "linear", (1, 8), (4, 8), True, ()))
    0.5

    ```
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        *,
        channels_last: bool = False,
        timer: Timer | None = None,
        folder: Path | str | bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1")
        self.device, self.dtype, self.batch_size, self.channels_last = device, dtype, batch_size, channels_last
        self.measured = 0
        self._timer = timer or timer_for(device)
        self._about = {
            "format": _FORMAT,
            "hardware": hardware_name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype),
            "torch": torch.__version__,
        }
        self._file = _file(folder, self._about)
        self._seconds: dict[str, float] = _read(self._file, self._about)

    def seconds(self, layer: LayerCall) -> float:
        """Seconds of one call with a whole batch."""
        key = self._key(layer)
        if key not in self._seconds:
            self.measure([layer])
        return self._seconds[key]

    def measure(self, layers: Iterable[LayerCall]) -> None:
        """Time those calls that the table doesn't have, round by round, so that a busy moment hits each but once."""
        missing = {self._key(layer): layer for layer in layers if self._key(layer) not in self._seconds}
        counts: dict[str, int] = {}
        for turn in range(_REPEATS):
            description = f"timing layers, round {turn + 1} of {_REPEATS}"
            for key, layer in track(missing.items(), description, len(missing)):
                run = self._run(layer)
                counts[key] = counts.get(key) or self._count(run)
                taken = self._timer(run, counts[key]) / counts[key]
                self._seconds[key] = min(taken, self._seconds.get(key, taken))
        self.measured += len(missing)

    def compare(self, a: LayerCall, b: LayerCall) -> tuple[float, float]:
        """Seconds of two calls timed in turn, now, whatever the table says."""
        runs, taken = (self._run(a), self._run(b)), ([], [])  # type: tuple[Any, Any], tuple[list[float], list[float]]
        counts = [self._count(run) for run in runs]
        for _ in range(_REPEATS):
            for run, count, own in zip(runs, counts, taken, strict=True):
                own.append(self._timer(run, count) / count)
        return min(taken[0]), min(taken[1])

    def save(self) -> None:
        """Save what was measured; a folder that can't be written is a warning only."""
        if self._file is None or not self.measured:
            return
        try:
            write_json(self._file, {**self._about, "seconds": _read(self._file, self._about) | self._seconds})
        except OSError as error:
            _LOG.warning("times of layers can't be saved in %s: %s", self._file, error)

    def _key(self, layer: LayerCall) -> str:
        kind = [layer.op, layer.data, layer.weight, layer.bias, layer.options]
        return json.dumps([self.batch_size, self.channels_last, *kind], default=str)

    def _count(self, run: Callable[[], Any]) -> int:
        self._timer(run, 1)
        return max(1, round(_BLOCK_SECONDS / max(self._timer(run, 1), 1e-9)))

    def _run(self, layer: LayerCall) -> Callable[[], Any]:
        """The bare op on tensors of its own."""

        def tensor(shape: tuple[int, ...]) -> Tensor:
            made = torch.full(shape, 0.01, dtype=self.dtype, device=self.device)
            images = self.channels_last and made.dim() == 4
            return made.contiguous(memory_format=torch.channels_last) if images else made

        data = tensor((layer.data[0] * self.batch_size, *layer.data[1:]))
        weight = tensor(layer.weight)
        outputs = layer.weight[1] * layer.groups if layer.out_axis else layer.weight[0]
        bias = tensor((outputs,)) if layer.bias else None
        op = partial(getattr(torch.ops.aten, layer.op), data, weight, bias, **dict(layer.options))

        def run() -> Any:
            with torch.inference_mode():
                return op()

        return run


def _file(folder: Path | str | bool | None, about: Mapping[str, Any]) -> Path | None:
    if folder is False:
        return None
    if folder is None or folder is True:
        folder = Path(os.environ.get("FILTERFOLD_CACHE") or Path.home() / ".cache" / "filterfold") / "latency"
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}.json"


def _read(file: Path | None, about: Mapping[str, Any]) -> dict[str, float]:
    """What a table holds; a missing, damaged or foreign one holds nothing."""
    if file is None:
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if {name: document[name] for name in about} != dict(about):
            return {}
        return {str(key): float(value) for key, value in document["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


_VECTOR = 16
"""Channels in one block of the CPU's convolutions: 512 bits of float32 (oneDNN's nChw16c format)."""


_TENSOR_CORE = 8
"""Multiples that tensor cores want in half precision (NVIDIA, Deep Learning Performance Guide)."""


_FASTER = 1.02
"""Narrower layers must be this much faster than rounded-up ones to be worth their odd width."""


def friendly_step(size: int, device: torch.device) -> int:
    """The multiple of channels at which the hardware is efficient, fine enough to choose among for `size` channels.

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
    """Layers whose odd widths save nothing: rounded up to an efficient width they are as fast.

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
    with threads_set(threads), preserved(model):
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
