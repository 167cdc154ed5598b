"""How long networks take, measured so that the figures hold up.

Fixed threads, warm-up, eval and inference mode, the same input for all, the networks timed in turn
(so that a slow phase of the machine hits all of them), medians, and the first network timed a
second time under another name: that A/A control must give 1.00, or the differences mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import ConfigError
from .modes import call, examples, undisturbed
from .progress import track

CONTROL = "A/A control"


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of one network at one batch size.

    **Arguments:**

    - `model`: its name.
    - `batch_size`: examples per call.
    - `seconds`: one entry per repeat: mean seconds per call within the repeat.
    """

    model: str
    batch_size: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        """Nearest-rank 90th percentile of the seconds per call."""
        return sorted(self.seconds)[-(-9 * len(self.seconds) // 10) - 1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Latencies of several networks; the first one is the reference.

    **Arguments:**

    - `rows`: one entry per batch size and network, the reference's control (`"A/A control"`) last.
    - `conditions`: device, threads, data type and version of PyTorch.
    """

    rows: tuple[Latency, ...]
    conditions: Mapping[str, str | int]

    def row(self, model: str, batch_size: int) -> Latency:
        """The entry of a network at a batch size."""
        return next(row for row in self.rows if (row.model, row.batch_size) == (model, batch_size))

    def speedup(self, model: str, batch_size: int) -> float:
        """Median over the repeats of reference time / time, both taken in the same repeat."""
        reference, other = self.row(self.rows[0].model, batch_size), self.row(model, batch_size)
        return statistics.median(a / b for a, b in zip(reference.seconds, other.seconds, strict=True))

    def __str__(self) -> str:
        """A plain-text table, one line a network and batch size."""
        table = [("model", "batch", "median ms", "p90 ms", "speed-up")]
        for row in self.rows:
            speedup = f"{self.speedup(row.model, row.batch_size):.2f}"
            table.append((row.model, str(row.batch_size), f"{1e3 * row.median:.3f}", f"{1e3 * row.p90:.3f}", speedup))
        widths = [max(len(line[column]) for line in table) for column in range(5)]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in self.conditions.items())])


def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 8, 64),
    threads: int | None = None,
    repeats: int = 20,
    warmup: int = 3,
    block_seconds: float = 0.02,
) -> Comparison:
    """Time several networks against each other.

    **Arguments:**

    - `models`: name → network; the first is the reference. All on one device; each is put into eval
      mode for the measurement and back into its own modes afterwards.
    - `example_inputs`: a tensor, a tuple of arguments or a mapping of keywords; its first example is
      repeated to make a batch. It lies on the device before the clock starts.
    - `batch_sizes`: examples per call.
    - `threads`: CPU threads inside an op; None leaves what is set.
    - `repeats`: blocks per network and batch size; in every round each network has one, and the
      order turns round from one to the next.
    - `warmup`: calls before the first block.
    - `block_seconds`: a block has as many calls as take about so long.

    **Returns:** a `Comparison`, with the A/A control.

    **Raises:** `ConfigError` for no networks, networks on several devices, or counts below 1.

    ```python
    >>> big, small = nn.Linear(64, 64), nn.Linear(64, 8)
    >>> found = measure_latency({"big": big, "small": small}, torch.zeros(1, 64), batch_sizes=[2], repeats=3)
    >>> [(row.model, row.batch_size, len(row.seconds)) for row in found.rows]
    [('big', 2, 3), ('small', 2, 3), ('A/A control', 2, 3)]

    ```
    """
    if not models or CONTROL in models:
        raise ConfigError(f"give at least one network to time, by a name other than {CONTROL!r}")
    if min((repeats, *batch_sizes), default=0) < 1 or not batch_sizes:
        raise ConfigError(f"repeats={repeats}, batch_sizes={list(batch_sizes)}: all must be at least 1")
    devices = {_place(model)[0] for model in models.values()}
    if len(devices) > 1:
        raise ConfigError(f"the networks lie on {' and '.join(sorted(map(str, devices)))}; move them to one device")
    device, dtype = _place(next(iter(models.values())))
    reference = next(iter(models.values()))
    entries = [*models.items(), (CONTROL, reference)]
    rows: list[Latency] = []
    with _threads(threads), undisturbed(*models.values()), torch.inference_mode():
        for batch_size in track(batch_sizes, "timing", len(batch_sizes)):
            batch = tree_map(
                lambda v: v.to(device) if isinstance(v, Tensor) else v, examples(example_inputs, batch_size)
            )
            rows += _in_turn(entries, batch, batch_size, device, repeats, warmup, block_seconds)
        conditions: dict[str, str | int] = {
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype),
        }
    return Comparison(tuple(rows), conditions | {"torch": torch.__version__})


def inference_seconds(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, batch_size: int = 128, repeats: int = 3
) -> float:
    """Seconds that a network takes for a whole set of images: the measure of the document's Figure 4.

    **Arguments:**

    - `model`: put into eval mode for the measurement, and back afterwards.
    - `images`: shape `(n, channels, height, width)`, or ready batches. Integer images are scaled to
      [0, 1]. Batches are on the device and converted before the clock starts: only the network
      is timed.
    - `batch_size`: images per call, where `images` is one tensor.
    - `repeats`: passes over the set; one more batch goes before as a warm-up.

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
    device, dtype = _place(model)

    def ready(batch: Tensor) -> Tensor:
        scale = 1 if batch.is_floating_point() else 255
        return batch.to(device).to(dtype) / scale

    clock = _clock(device)

    def once() -> float:
        return sum(clock(partial(model, ready(batch)), 1) for batch in batches)

    with undisturbed(model), torch.inference_mode():
        model(ready(batches[0]))
        return statistics.median(once() for _ in range(repeats))


def _in_turn(
    entries: Sequence[tuple[str, nn.Module]],
    batch: Any,
    batch_size: int,
    device: torch.device,
    repeats: int,
    warmup: int,
    block_seconds: float,
) -> list[Latency]:
    clock = _clock(device)
    runs = [partial(call, model, batch) for _, model in entries]
    counts = []
    for run in runs:
        clock(run, max(1, warmup))
        counts.append(max(1, round(block_seconds / max(clock(run, 1), 1e-9))))
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats):
        order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            seconds[index].append(clock(runs[index], counts[index]) / counts[index])
    return [Latency(name, batch_size, tuple(taken)) for (name, _), taken in zip(entries, seconds, strict=True)]


def _clock(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """A function that runs something so many times and gives the seconds: events on a GPU, else wall time."""

    def on_cpu(run: Callable[[], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - start

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
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return tensor.device, tensor.dtype


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
