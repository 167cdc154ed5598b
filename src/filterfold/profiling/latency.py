"""Time of whole networks: a clock, the ways to run a network, and measuring several in turn with a control."""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ConfigError
from ..export.onnx_network import OnnxNetwork
from ..utils.arguments import typed
from ..utils.environment import processor
from ..utils.inputs import call_as_is, check_inputs, examples
from ..utils.model_state import preserved
from ..utils.progress import track
from .latency_results import CONTROL, Latency, LatencyComparison
from .macs import measure

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
    if count is not None and count < 1:
        raise ConfigError(f"threads={count}: at least 1, or None")
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
    return processor()


def load_average() -> float | None:
    """Processes that want to run, over the last minute; None where the system doesn't say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


Mode = Literal["eager", "channels_last", "compile", "onnxruntime"]


MODES: tuple[Mode, ...] = get_args(Mode)


Runner = Callable[[Any], Callable[[], Any]]
"""Takes a batch on the device, gives what runs the network on it once."""


def prepare(model: nn.Module, mode: Mode, example: Any) -> Runner:
    """Make a network ready to be timed in a mode; the network itself is not changed.

    **Arguments:**

    - `model`: in eval mode. An `OnnxNetwork` is run as it is, in the modes `eager` and `onnxruntime`.
    - `mode`: one of `MODES`. `channels_last` copies the model; `onnxruntime` exports it (CPU only,
      with as many threads as PyTorch has set).
    - `example`: one example on the model's device.

    **Raises:** `ConfigError` for an unknown mode or one that the device can't have; `ExportError`.
    """
    if isinstance(model, OnnxNetwork):
        if mode not in ("eager", "onnxruntime"):
            raise ConfigError(f"mode={mode!r}: a network in an ONNX file is run by ONNX Runtime alone")
        return model.runner
    if mode == "eager":
        return lambda batch: partial(call_as_is, model, batch)
    if mode == "channels_last":
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda batch: partial(call_as_is, twin, tree_map(channels_last, batch))
    if mode == "compile":
        compiled = cast(nn.Module, torch.compile(model, dynamic=False))
        return lambda batch: partial(call_as_is, compiled, batch)
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
    from ..export.program import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        to_onnx(model, example, file, check=False)
        return OnnxNetwork(file).runner


_LEAST_REPEATS = 7
"""Where time is short: the fewest values whose second smallest and second largest still tell something."""


@typed
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
) -> LatencyComparison:
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

    **Returns:** a `LatencyComparison`, with the A/A control.

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
    check_inputs(example_inputs, with_data=True)
    example = _moved(examples(example_inputs), device)
    rows: list[Latency] = []
    rounds = _Rounds(timer or timer_for(device), repeats, warmup, block_seconds, max_seconds)
    counted = {name: model for name, model in models.items() if count_macs and not isinstance(model, OnnxNetwork)}
    macs = {name: measure(model, example).macs for name, model in counted.items()}
    with threads_set(threads), preserved(*models.values()), compiling(mode):
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
            for batch_size in batch_sizes:
                batch = examples(example, batch_size)
                times = rounds.times([runner(batch) for _, runner in runners], f"timing, {mode}, batch {batch_size}")
                rows += [Latency(name, batch_size, tuple(own)) for (name, _), own in zip(runners, times, strict=True)]
    return LatencyComparison(tuple(rows), conditions, macs)


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
    - `batch_size`: images per call_as_is, where `images` is one tensor.
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

    with preserved(model), torch.inference_mode():
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


def in_turn(count: int, turn: int) -> range:
    """The order in which one of several rounds takes so many networks: forwards, then backwards, and so on.

    >>> list(in_turn(3, 0)), list(in_turn(3, 1))
    ([0, 1, 2], [2, 1, 0])
    """
    return range(count) if turn % 2 == 0 else range(count - 1, -1, -1)


def _moved(inputs: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)


@dataclass(frozen=True, slots=True)
class _Rounds:
    """How often, and for how long, networks are timed in turn; see `measure_latency`."""

    timer: Timer
    repeats: int
    warmup: int
    block_seconds: float
    max_seconds: float

    def __post_init__(self) -> None:
        """Refuse what is no number of calls or seconds."""
        if self.warmup < 0 or not 0 < self.block_seconds < math.inf or not self.max_seconds >= 0:
            raise ConfigError(
                f"warmup={self.warmup}, block_seconds={self.block_seconds}, max_seconds={self.max_seconds}: calls from "
                "0 on, and seconds above 0"
            )

    def times(self, runs: Sequence[Callable[[], Any]], description: str) -> list[list[float]]:
        """For every network the seconds per call in each round; the last one is the control of the first."""
        counts = []
        for run in runs:
            self.timer(run, max(1, self.warmup))
            counts.append(max(1, round(self.block_seconds / max(self.timer(run, 1), 1e-9))))
        counts[-1] = counts[0]  # the control is the reference once more, in every respect
        seconds: list[list[float]] = [[] for _ in runs]
        spent = 0.0
        for repeat in track(range(self.repeats), description, self.repeats):
            if spent > self.max_seconds and repeat >= _LEAST_REPEATS:
                break
            for index in in_turn(len(runs), repeat):
                taken = self.timer(runs[index], counts[index])
                seconds[index].append(taken / counts[index])
                spent += taken
        return seconds
