"""Inference time: seconds for the whole test set, batch by batch, nothing but the network.

Each trial times its own network once. That figure says little beside another one, taken at another time on a machine
that was busy with something else; so when all trials have ended, one *timing pass* times all networks in one process,
interleaved: every round takes each network once over the test set, and the median over the rounds is what counts.
One network is timed a second time under another name, as an A/A control: its ratio tells how far figures may differ
for no reason. Images are normalised and on the device beforehand; `eval()` and inference mode; the same batches and
precision for all.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoint import load
from ..data import batches
from ..latency import inference_seconds
from ..progress import track
from ..storage import write_json
from . import records
from .bench import Bench
from .environment import device_name, processor
from .records import Record, Timing

BATCH_SIZE = 128
"""As in the document's experiment."""

IMAGE_BYTES = 512 << 20
"""Images held ready at most; of a larger test set a part is timed and the time scaled up."""


def measure_alone(model: nn.Module, bench: Bench) -> Timing:
    """Time one network once."""
    images, scale = _images(bench)
    return _timing("alone", [scale * inference_seconds(model, images, repeats=1)], bench, None, None)


def measure_together(finished: Sequence[Record], bench: Bench, rounds: int) -> list[Record]:
    """Time the networks of all finished trials, interleaved, unless these very trials have been timed together.

    **Arguments:**

    - `finished`: records of finished trials; their networks lie in the bench's run folder.
    - `rounds`: passes of each network over the test set.

    **Returns:** the records with the new times, written to the run folder; empty if there was nothing to do.

    **Raises:** `Stopped` when the time is up; the passes made so far are kept for the next call.
    """
    key = hashlib.sha256(" ".join(sorted(record["id"] for record in finished)).encode()).hexdigest()[:16]
    if all(record["timing"] and record["timing"]["together_with"] == key for record in finished):
        return []
    kept = bench.work("timing.json")
    seconds = _take_up(kept, key, bench, len(finished) + 1)  # the last: the first network again, as a control
    try:
        _go_round(finished, seconds, bench, rounds)
    finally:
        write_json(kept, {"where": _where(key, bench), "seconds": seconds})
    *own, control = seconds
    ratio = statistics.median(control) / statistics.median(own[0])
    timed = [_timed(record, times, bench, key, ratio) for record, times in zip(finished, own, strict=True)]
    for record in timed:
        records.write(bench.folder, record)
    kept.unlink()
    return timed


def _go_round(finished: Sequence[Record], seconds: list[list[float]], bench: Bench, rounds: int) -> None:
    """Time the networks one after the other, round after round, until each has been timed `rounds` times."""
    images, scale = _images(bench)
    models = [
        load(bench.model_file(record["id"]), partial(bench.build, record["seed"]), device=bench.device)
        for record in finished
    ]
    models.append(models[0])
    there, back = range(len(models)), range(len(models))[::-1]
    left = [index for turn in range(rounds) for index in (back if turn % 2 else there) if len(seconds[index]) <= turn]
    last = 0.0
    for index in track(left, "timing all networks, interleaved", len(left)):
        bench.deadline.check_next(max(seconds[index], default=last))
        last = scale * inference_seconds(models[index], images, repeats=1)
        seconds[index].append(last)


def _take_up(kept: Path, key: str, bench: Bench, count: int) -> list[list[float]]:
    """The seconds measured before an interruption, if it was with these networks on this machine."""
    try:
        document = json.loads(kept.read_text(encoding="utf-8"))
        if document["where"] == _where(key, bench) and len(document["seconds"]) == count:
            return [list(map(float, own)) for own in document["seconds"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a hint only: without it everything is timed from the start
    return [[] for _ in range(count)]


def _where(key: str, bench: Bench) -> list[str]:
    return [key, device_name(bench.device), processor(), str(torch.get_num_threads())]


def _images(bench: Bench) -> tuple[list[Tensor], float]:
    """The test images as batches on the device, and what to multiply seconds with if they are only a part."""
    test, held, ready = bench.data.test.to(bench.device), 0, []
    for images, _ in batches(test, BATCH_SIZE, device=bench.device):
        ready.append(images)
        held += len(images)
        if held * images[0].nbytes > IMAGE_BYTES:
            break
    return ready, len(test) / held


def _timing(
    mode: Literal["alone", "together"], rounds: list[float], bench: Bench, key: str | None, control: float | None
) -> Timing:
    return Timing(
        mode=mode,
        rounds=rounds,
        batch_size=BATCH_SIZE,
        device=device_name(bench.device),
        processor=processor(),
        threads=torch.get_num_threads(),
        together_with=key,
        control=control,
    )


def _timed(record: Record, rounds: list[float], bench: Bench, key: str, control: float) -> Record:
    result = record["result"]
    assert result is not None
    inference = statistics.median(rounds)
    return {
        **record,
        "result": {**result, "inference_seconds": inference},
        "timing": _timing("together", rounds, bench, key, control),
    }
