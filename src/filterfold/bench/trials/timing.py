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
from typing import Literal

import torch
from torch import Tensor, nn

from ...data import batches
from ...profiling import in_turn, inference_seconds, wasted_widths
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


ROUNDS, MOST_ROUNDS, SHORT_SECONDS, SHORT_SHARE = 3, 9, 5.0, 0.1
"""Rounds, and how many there may be as long as all of them together take under so many seconds and under this share of
what the networks' training took."""


WHOLE = "whole"
"""The column of the test set among those of batch sizes."""


log = logging.getLogger("filterfold.bench.trials")


@dataclass(frozen=True, slots=True)
class _Column:
    """Batches that a network is called with; the seconds that they take times `factor` are its figure."""

    images: list[Tensor]
    factor: float

    def seconds(self, model: nn.Module) -> float:
        return self.factor * inference_seconds(model, self.images, repeats=1)


def measure_alone(model: nn.Module, context: RunContext) -> Timing:
    """Time one network once over the test set."""
    return _timing("alone", [_whole(context).seconds(model)], context, None, None)


def measure_together(
    finished: Sequence[Record],
    context: RunContext,
    rounds: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> list[Record]:
    """Time the networks of all finished trials, interleaved, unless these very trials have been timed together.

    **Arguments:**

    - `finished`: records of finished trials. Those whose networks are not in the run folder (records alone were handed
      on) keep the times that they have.
    - `rounds`: passes of each network over the test set; None: `ROUNDS`, more where that is a matter of seconds.
    - `batch_sizes`: images a call, besides the whole test set. Those whose images take over `BATCH_BYTES` are left out.

    **Returns:** the records with the new times, written to the run folder; empty if there was nothing to do.

    **Raises:** `Stopped` when the time is up; the passes made so far are kept for the next call.
    """
    there = [record for record in finished if context.model_file(record["id"]).exists()]
    if len(there) < len(finished):
        gone = len(finished) - len(there)
        log.info("timing: %d of %d networks are not in the run folder and are left out", gone, len(finished))
    key = hashlib.sha256(" ".join(sorted(record["id"] for record in there)).encode()).hexdigest()[:16]
    if all(_is_timed(record, key, batch_sizes) for record in there):
        _kept(context).unlink(missing_ok=True)  # killed before it was removed
        return []
    timing = _TimingPass(there, context, batch_sizes, key)
    try:
        timing.measure(rounds)
        timing.look_at_widths()
    finally:
        timing.save()
    timed = timing.timed()
    for record in timed:
        records.write(context.folder, record)
    timing.kept.unlink()
    return timed


def _is_timed(record: Record, key: str, batch_sizes: Sequence[int]) -> bool:
    """Whether a record was timed with the others, at these batch sizes; records of older versions know of none."""
    timing = record["timing"]
    if timing is None or timing["together_with"] != key:
        return False
    return timing.get("asked", list(batch_sizes)) == list(batch_sizes)


def _kept(context: RunContext) -> Path:
    """Where a timing pass that was interrupted keeps what it has measured."""
    return context.work("timing.json")


class _TimingPass:
    """The networks that are timed together, and what was measured so far.

    - `seconds`: column → one list for each network, the last for the first network again, as a control.
    - `wasted`: label → layers whose widths save nothing.
    """

    def __init__(self, finished: Sequence[Record], context: RunContext, batch_sizes: Sequence[int], key: str) -> None:
        self.finished, self.context, self.asked, self.key = finished, context, list(batch_sizes), key
        self.columns = _columns(context, batch_sizes)
        self.models = [
            load(context.model_file(record["id"]), partial(context.fresh, record["seed"]), device=context.device)
            for record in finished
        ]
        self.seconds: dict[str, list[list[float]]] = {name: [[] for _ in [*finished, None]] for name in self.columns}
        self.wasted: dict[str, list[str]] = {}
        self.kept = _kept(context)
        threads = str(torch.get_num_threads())
        self.conditions = [key, device_name(context.device), processor(), threads, *self.columns]
        try:
            document = json.loads(self.kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if document.get("conditions") == self.conditions:
            self.seconds, self.wasted = document["seconds"], document["wasted"]

    def save(self) -> None:
        """Keep what was measured, for the case of an interruption."""
        write_json(self.kept, {"conditions": self.conditions, "seconds": self.seconds, "wasted": self.wasted})

    def measure(self, rounds: int | None) -> None:
        """Time the networks one after the other, round after round."""
        models = [*self.models, self.models[0]]
        trained = sum(record["result"]["train_seconds"] for record in self.finished if record["result"])
        short = min(SHORT_SECONDS, SHORT_SHARE * trained)
        for turn in range(rounds or MOST_ROUNDS):
            if rounds is None and turn >= ROUNDS and self._spent() >= short:
                break
            order = [(name, place) for name in self.columns for place in in_turn(len(models), turn)]
            left = [(name, place) for name, place in order if len(self.seconds[name][place]) <= turn]
            last = 0.0
            for name, place in track(left, f"timing all networks, round {turn + 1}", len(left)):
                own, column = self.seconds[name][place], self.columns[name]
                self.context.deadline.check_next(max(own, default=last) / column.factor)
                last = column.seconds(models[place])
                own.append(last)

    def _spent(self) -> float:
        """Seconds that have gone into the figures."""
        return sum(sum(map(sum, own)) / self.columns[name].factor for name, own in self.seconds.items())

    def look_at_widths(self) -> None:
        """Time the layers of the first cut network of each label at rounded-up widths; it stands for the label.

        Not where no batch sizes were asked for: then nothing but the test set counts.
        """
        if not self.asked:
            return
        for record, model in zip(self.finished, self.models, strict=True):
            result = record["result"]
            cut = result is not None and any(before != after for before, after in result.get("widths", {}).values())
            if cut and record["label"] not in self.wasted:
                self.context.deadline.check()
                self.wasted[record["label"]] = list(wasted_widths(model, self.context.example))

    def timed(self) -> list[Record]:
        """The records with their networks' times."""
        medians = {name: [statistics.median(own) for own in lists] for name, lists in self.seconds.items()}
        controls = {name: own[-1] / own[0] for name, own in medians.items()}
        timed: list[Record] = []
        for place, record in enumerate(self.finished):
            result = record["result"]
            assert result is not None
            own = {name: lists[place] for name, lists in self.seconds.items()}
            timing = _timing("together", own.pop(WHOLE), self.context, self.key, controls[WHOLE])
            timing |= {"asked": self.asked, "batches": own, "controls": {name: controls[name] for name in own}}
            if record["label"] in self.wasted:
                timing["wasted"] = self.wasted[record["label"]]
            seconds = medians[WHOLE][place]
            timed.append({**record, "result": {**result, "inference_seconds": seconds}, "timing": timing})
        return timed


def _columns(context: RunContext, batch_sizes: Sequence[int]) -> dict[str, _Column]:
    """Name → column: the whole test set, and every batch size that fits."""
    whole = _whole(context)
    found = {WHOLE: whole}
    for size in dict.fromkeys(batch_sizes):
        if size * whole.images[0][0].nbytes > BATCH_BYTES:
            log.info("timing: batch %d is left out, as its images alone take over %d MiB", size, BATCH_BYTES >> 20)
        else:
            found[str(size)] = _called(whole.images, size)
    return found


def _whole(context: RunContext) -> _Column:
    """The test images as batches on the device; where they are only a part, the seconds are scaled up."""
    test, held, ready = context.data.test.to(context.device), 0, []
    for images, _ in batches(test, BATCH_SIZE, device=context.device):
        ready.append(images)
        held += len(images)
        if held * images[0].nbytes > IMAGE_BYTES:
            break
    return _Column(ready, len(test) / held)


def _called(images: Sequence[Tensor], size: int) -> _Column:
    """Calls with so many of these images each; where there are fewer, some come again."""
    calls, enough = max(1, CALL_IMAGES // size), images[: -(-size // BATCH_SIZE)]
    some = torch.cat(list(enough))
    return _Column([some.repeat(-(-size // len(some)), 1, 1, 1)[:size]] * calls, 1 / calls)


def _timing(
    mode: Literal["alone", "together"], rounds: list[float], context: RunContext, key: str | None, control: float | None
) -> Timing:
    return Timing(
        mode=mode,
        rounds=rounds,
        batch_size=BATCH_SIZE,
        device=device_name(context.device),
        processor=processor(),
        threads=torch.get_num_threads(),
        together_with=key,
        control=control,
    )
