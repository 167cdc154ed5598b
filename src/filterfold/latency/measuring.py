"""Whole networks against each other, and one network over a whole set of images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..cost import measure
from ..errors import ConfigError
from ..modes import examples, undisturbed
from ..progress import track
from .clock import Timer, device_name, load_average, place_of, threads_set, timer_for
from .results import CONTROL, Comparison, Latency
from .runners import MODES, Mode, Runner, compiling, prepare

_LEAST_REPEATS = 7
"""Where time is short: the fewest values whose second smallest and second largest still tell something."""


def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 8, 64, 512),
    mode: Mode = "eager",
    threads: int | None = None,
    repeats: int = 20,
    warmup: int = 3,
    block_seconds: float = 0.02,
    max_seconds: float = 60.0,
    count_macs: bool = True,
    timer: Timer | None = None,
) -> Comparison:
    """Time several networks against each other.

    **Arguments:**

    - `models`: name → network; the first is the reference. All on one device; each is put into eval
      mode for the measurement and back into its own modes afterwards.
    - `example_inputs`: a tensor, a tuple of arguments or a mapping of keywords; its first example is
      repeated to make a batch. It lies on the device before the clock starts.
    - `batch_sizes`: examples per call.
    - `mode`: how all of them are run: `"eager"`, `"channels_last"`, `"compile"` (`torch.compile`), or
      `"onnxruntime"` (exported, on the CPU).
    - `threads`: CPU threads inside an op; None leaves what is set.
    - `repeats`: blocks per network and batch size; in every round each network has one, and the
      order turns round from one to the next.
    - `warmup`: calls before the first block.
    - `block_seconds`: a block has as many calls as take about so long.
    - `max_seconds`: after so long at one batch size no further round starts (but 7 are made).
    - `count_macs`: whether to count multiply-accumulates as well, for the ratio beside the speed-up.
    - `timer`: runs a callable so many times and gives the seconds; None: the device's clock (events
      on a GPU, wall time elsewhere).

    **Returns:** a `Comparison`, with the A/A control.

    **Raises:** `ConfigError` for no networks, networks on several devices, an unknown mode, or counts
    below 1.

    ```python
    >>> big, small = nn.Linear(64, 64), nn.Linear(64, 8)
    >>> found = measure_latency({"big": big, "small": small}, torch.zeros(1, 64), batch_sizes=[2], repeats=3)
    >>> [(row.model, row.batch_size, len(row.seconds)) for row in found.rows]
    [('big', 2, 3), ('small', 2, 3), ('A/A control', 2, 3)]
    >>> found.macs_ratio("small")
    8.0

    ```
    """
    device, dtype = _check(models, batch_sizes, repeats, mode)
    example = _moved(examples(example_inputs), device)
    rows: list[Latency] = []
    timer = timer or timer_for(device)
    macs = {name: measure(model, example).macs for name, model in models.items()} if count_macs else {}
    with threads_set(threads), undisturbed(*models.values()), compiling(mode):
        runners: list[tuple[str, Runner]] = [(name, prepare(model, mode, example)) for name, model in models.items()]
        runners.append((CONTROL, runners[0][1]))
        conditions: dict[str, str | int | float | None] = {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype),
            "mode": mode,
            "torch": torch.__version__,
            "load": load_average(),
        }
        with torch.inference_mode():
            for batch_size in track(batch_sizes, f"timing, {mode}", len(batch_sizes)):
                batch = examples(example, batch_size)
                rows += _in_turn(runners, batch, batch_size, timer, repeats, warmup, block_seconds, max_seconds)
    return Comparison(tuple(rows), conditions, macs)


def inference_seconds(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 128,
    repeats: int = 3,
    timer: Timer | None = None,
) -> float:
    """Seconds that a network takes for a whole set of images: the measure of the document's Figure 4.

    **Arguments:**

    - `model`: put into eval mode for the measurement, and back afterwards.
    - `images`: shape `(n, channels, height, width)`, or ready batches. Integer images are scaled to
      [0, 1]. Batches are on the device and converted before the clock starts: only the network
      is timed.
    - `batch_size`: images per call, where `images` is one tensor.
    - `repeats`: passes over the set; one more batch goes before as a warm-up.
    - `timer`: as in `measure_latency`.

    **Returns:** the median over the passes of the seconds in the network.

    **Raises:** `ConfigError` if there are no images, or for counts below 1.

    ```python
    >>> inference_seconds(nn.Flatten(), torch.zeros(300, 1, 2, 2, dtype=torch.uint8)) > 0
    True

    ```
    """
    if min(batch_size, repeats) < 1:
        raise ConfigError(f"batch_size={batch_size}, repeats={repeats}: must be at least 1")
    batches = torch.split(images, batch_size) if isinstance(images, Tensor) else tuple(images)
    if not sum(map(len, batches)):
        raise ConfigError("there are no images to time the network on")
    device, dtype = place_of(model)

    def ready(batch: Tensor) -> Tensor:
        scale = 1 if batch.is_floating_point() else 255
        return batch.to(device).to(dtype) / scale

    clock = timer or timer_for(device)

    def once() -> float:
        return sum(clock(partial(model, ready(batch)), 1) for batch in batches)

    with undisturbed(model), torch.inference_mode():
        model(ready(batches[0]))
        return statistics.median(once() for _ in range(repeats))


def _check(
    models: Mapping[str, nn.Module], batch_sizes: Sequence[int], repeats: int, mode: str
) -> tuple[torch.device, torch.dtype]:
    if not models or CONTROL in models:
        raise ConfigError(f"give at least one network to time, by a name other than {CONTROL!r}")
    if min((repeats, *batch_sizes), default=0) < 1 or not batch_sizes:
        raise ConfigError(f"repeats={repeats}, batch_sizes={list(batch_sizes)}: all must be at least 1")
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    devices = {place_of(model)[0] for model in models.values()}
    if len(devices) > 1:
        raise ConfigError(f"the networks lie on {' and '.join(sorted(map(str, devices)))}; move them to one device")
    return place_of(next(iter(models.values())))


def _moved(inputs: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)


def _in_turn(
    runners: Sequence[tuple[str, Runner]],
    batch: Any,
    batch_size: int,
    timer: Timer,
    repeats: int,
    warmup: int,
    block_seconds: float,
    max_seconds: float,
) -> list[Latency]:
    runs = [runner(batch) for _, runner in runners]
    counts = []
    for run in runs:
        timer(run, max(1, warmup))
        counts.append(max(1, round(block_seconds / max(timer(run, 1), 1e-9))))
    counts[-1] = counts[0]  # the control is the reference once more, in every respect
    seconds: list[list[float]] = [[] for _ in runs]
    spent = 0.0
    for repeat in range(repeats):
        if spent > max_seconds and repeat >= _LEAST_REPEATS:
            break
        order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            taken = timer(runs[index], counts[index])
            seconds[index].append(taken / counts[index])
            spent += taken
    return [Latency(name, batch_size, tuple(own)) for (name, _), own in zip(runners, seconds, strict=True)]
