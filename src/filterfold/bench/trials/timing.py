"""Inference time: seconds for the whole test set, and seconds a call at several batch sizes, nothing but the network.

Each trial times its own network once. That figure says little beside another one, taken at another time on a machine
that was busy with something else; so when all trials have ended, one *timing pass* times all networks in one process,
interleaved: every round takes each network once over the test set and once at each batch size, and the median over the
rounds is what counts. One network is timed a second time under another name, as an A/A control: its ratio tells how
far figures may differ for no reason. Images are normalised and on the device beforehand; `eval()` and inference mode;
the same batches and precision for all. Last, the widths of one network of each kind are looked at: which of them save
nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ...data import batches
from ...profiling import inference_seconds, wasted_widths
from ...surgery.checkpoint import load
from ...utils.environment import device_name, processor
from ...utils.io import write_json
from ...utils.progress import track
from . import records
from .context import RunContext
from .records import Record, Timing

BATCH_SIZE = 128
"""As in the document's experiment."""


BATCH_SIZES = (1, 8, 64, 512)
"""What networks are called with in use, from one image at a time to as many as fit."""


CALL_IMAGES = 256
"""Images that a network sees in a round at a batch size, at least: 256 calls with one image, 4 with 64."""


IMAGE_BYTES = 512 << 20
"""Images held ready at most; of a larger test set a part is timed and the time scaled up."""


BATCH_BYTES = 64 << 20
"""A batch with more bytes of images than this is left out: what the layers make of it may not fit in memory."""


ROUNDS, MOST_ROUNDS, SHORT_SECONDS = 3, 9, 5.0
"""Rounds, and how many there may be as long as all of them together take under so many seconds."""


WHOLE = "whole"
"""The column of the test set among those of batch sizes."""


log = logging.getLogger("filterfold.bench.trials")


Sheet = dict[str, list[list[float]]]
"""Column (`whole`, or a batch size) → one list a network: seconds of each round."""


@dataclass(frozen=True, slots=True)
class _Feed:
    """Batches that a network is called with, and what makes the figure of the seconds that they take."""

    images: list[Tensor]
    factor: float

    def seconds(self, model: nn.Module) -> float:
        return self.factor * inference_seconds(model, self.images, repeats=1)


def measure_alone(model: nn.Module, bench: RunContext) -> Timing:
    """Time one network once over the test set."""
    return _timing("alone", [_whole(bench).seconds(model)], bench, None, None)


def measure_together(
    finished: Sequence[Record], bench: RunContext, rounds: int | None = None, batch_sizes: Sequence[int] = BATCH_SIZES
) -> list[Record]:
    """Time the networks of all finished trials, interleaved, unless these very trials have been timed together.

    **Arguments:**

    - `finished`: records of finished trials. Those whose networks are not in the bench's run folder (records alone
      were handed on) keep the times that they have.
    - `rounds`: passes of each network over the test set; None: `ROUNDS`, more where that is a matter of seconds.
    - `batch_sizes`: images a call, besides the whole test set. Those whose images take over `BATCH_BYTES` are left out.

    **Returns:** the records with the new times, written to the run folder; empty if there was nothing to do.

    **Raises:** `Stopped` when the time is up; the passes made so far are kept for the next call.
    """
    known = len(finished)
    finished = [record for record in finished if bench.model_file(record["id"]).exists()]
    if len(finished) < known:
        log.info("timing: %d of %d networks are not in the run folder and are left out", known - len(finished), known)
    key = hashlib.sha256(" ".join(sorted(record["id"] for record in finished)).encode()).hexdigest()[:16]
    if not finished or all(_is_timed(record, key, batch_sizes) for record in finished):
        return []
    feeds = _feeds(bench, batch_sizes)
    kept = bench.work("timing.json")
    sheet, wasted = _take_up(kept, key, bench, feeds, len(finished) + 1)  # the last: the first again, as a control
    models = [
        load(bench.model_file(record["id"]), partial(bench.build, record["seed"]), device=bench.device)
        for record in finished
    ]
    try:
        _go_round([*models, models[0]], feeds, sheet, bench, rounds)
        _look_at_widths(finished, models, wasted, bench)
    finally:
        write_json(kept, {"where": _where(key, bench), "seconds": sheet, "wasted": wasted})
    controls, timed = _controls(sheet), []
    for place, record in enumerate(finished):
        own = {name: column[place] for name, column in sheet.items()}
        timed.append(_timed(record, own, controls, bench, key, list(batch_sizes)))
        if record["label"] in wasted:
            cast(Timing, timed[-1]["timing"])["wasted"] = wasted[record["label"]]
    for record in timed:
        records.write(bench.folder, record)
    kept.unlink()
    return timed


def _is_timed(record: Record, key: str, batch_sizes: Sequence[int]) -> bool:
    """Whether a record was timed with the others, at these batch sizes; records of older versions know of none."""
    timing = record["timing"]
    if timing is None or timing["together_with"] != key:
        return False
    return timing.get("asked", list(batch_sizes)) == list(batch_sizes)


def _go_round(
    models: Sequence[nn.Module], feeds: dict[str, _Feed], sheet: Sheet, bench: RunContext, rounds: int | None
) -> None:
    """Time the networks one after the other, round after round."""
    turn = 0
    while turn < (rounds or ROUNDS) or (rounds is None and turn < MOST_ROUNDS and _spent(sheet, feeds) < SHORT_SECONDS):
        there = range(len(models))
        order = there[::-1] if turn % 2 else there
        left = [(name, place) for name in feeds for place in order if len(sheet[name][place]) <= turn]
        last = 0.0
        for name, place in track(left, f"timing all networks, round {turn + 1}", len(left)):
            column, feed = sheet[name], feeds[name]
            bench.deadline.check_next(max(column[place], default=last) / feed.factor)
            column[place].append(feed.seconds(models[place]))
            last = column[place][-1]
        turn += 1


def _spent(sheet: Sheet, feeds: dict[str, _Feed]) -> float:
    """Seconds that have gone into the figures."""
    return sum(sum(map(sum, column)) / feeds[name].factor for name, column in sheet.items())


def _look_at_widths(
    finished: Sequence[Record], models: Sequence[nn.Module], wasted: dict[str, list[str]], bench: RunContext
) -> None:
    """Time the layers of the first cut network of each label at rounded-up widths; its remarks stand for the label."""
    for record, model in zip(finished, models, strict=True):
        result = record["result"]
        cut = result is not None and any(before != after for before, after in result.get("widths", {}).values())
        if cut and record["label"] not in wasted:
            bench.deadline.check()
            wasted[record["label"]] = list(wasted_widths(model, bench.example))


def _take_up(
    kept: Path, key: str, bench: RunContext, feeds: dict[str, _Feed], count: int
) -> tuple[Sheet, dict[str, list[str]]]:
    """What was measured before an interruption, if it was with these networks on this machine."""
    empty: Sheet = {name: [[] for _ in range(count)] for name in feeds}
    try:
        document = json.loads(kept.read_text(encoding="utf-8"))
        sheet = {name: [list(map(float, own)) for own in column] for name, column in document["seconds"].items()}
        fits = sheet.keys() == empty.keys() and all(len(column) == count for column in sheet.values())
        if document["where"] == _where(key, bench) and fits:
            return sheet, {label: list(map(str, found)) for label, found in document["wasted"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a hint only: without it everything is timed from the start
    return empty, {}


def _where(key: str, bench: RunContext) -> list[str]:
    return [key, device_name(bench.device), processor(), str(torch.get_num_threads())]


def _feeds(bench: RunContext, batch_sizes: Sequence[int]) -> dict[str, _Feed]:
    """Column → what networks are called with."""
    whole = _whole(bench)
    found = {WHOLE: whole}
    for size in dict.fromkeys(batch_sizes):
        if size * whole.images[0][0].nbytes > BATCH_BYTES:
            log.info("timing: batch %d is left out, as its images alone take over %d MiB", size, BATCH_BYTES >> 20)
        else:
            found[str(size)] = _called(whole.images, size)
    return found


def _whole(bench: RunContext) -> _Feed:
    """The test images as batches on the device; where they are only a part, the seconds are scaled up."""
    test, held, ready = bench.data.test.to(bench.device), 0, []
    for images, _ in batches(test, BATCH_SIZE, device=bench.device):
        ready.append(images)
        held += len(images)
        if held * images[0].nbytes > IMAGE_BYTES:
            break
    return _Feed(ready, len(test) / held)


def _called(images: Sequence[Tensor], size: int) -> _Feed:
    """Calls with so many of these images each; where there are fewer, some come again."""
    calls, enough = max(1, CALL_IMAGES // size), images[: -(-size // BATCH_SIZE)]
    some = torch.cat(list(enough))
    return _Feed([some.repeat(-(-size // len(some)), 1, 1, 1)[:size]] * calls, 1 / calls)


def _controls(sheet: Sheet) -> dict[str, float]:
    """Column → time of the control over that of the very same network under its own name."""
    return {name: statistics.median(own[-1]) / statistics.median(own[0]) for name, own in sheet.items()}


def _timing(
    mode: Literal["alone", "together"], rounds: list[float], bench: RunContext, key: str | None, control: float | None
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


def _timed(
    record: Record,
    own: dict[str, list[float]],
    controls: dict[str, float],
    bench: RunContext,
    key: str,
    asked: list[int],
) -> Record:
    """The record with its network's times."""
    result = record["result"]
    assert result is not None
    rounds = {name: seconds for name, seconds in own.items() if name != WHOLE}
    timing = _timing("together", own[WHOLE], bench, key, controls[WHOLE])
    timing |= {"asked": asked, "batches": rounds, "controls": {name: controls[name] for name in rounds}}
    return {**record, "result": {**result, "inference_seconds": statistics.median(own[WHOLE])}, "timing": timing}
