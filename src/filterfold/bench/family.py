"""A family of children as a folder: each is written when it is done; a rerun goes on with those that are missing."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageData
from ..errors import RecordError
from ..export.program import to_onnx
from ..online import Child, shrink
from ..profiling import measure_latency
from ..profiling.macs import measure
from ..surgery.checkpoint import load, save
from ..training.evaluate import predicted
from ..utils.environment import describe
from ..utils.io import write_json
from .trials.start import input_of, network_of

FILE = "family.json"
"""What all children share, and how fast they are: written first without the times, and last with them."""

UNCUT = "uncut"
"""What the network that all were cut from is called."""

_log = logging.getLogger("filterfold.bench.family")


@dataclass(frozen=True, slots=True)
class Making:
    """How children are made and measured.

    **Arguments:**

    - `shrinking`: arguments of `filterfold.shrink`, but for the network, the shares and the training.
    - `train`: trains a child in place, and notes in the record (a dictionary) what is to be known of it; the path is
      for its checkpoint. None: the cut without training.
    - `onnx`: whether to write ONNX files, too.
    - `batch_sizes`: at which all networks are timed in turn.
    """

    shrinking: Mapping[str, Any]
    train: Callable[[Child, Path, dict[str, Any]], None] | None = None
    onnx: bool = False
    batch_sizes: Sequence[int] = (1, 64)


@dataclass(eq=False)
class Family:
    """A folder with one network's children.

    It holds `family.json`, and for each child `macs-SHARE.safetensors`, `macs-SHARE.json` (written last: what has none
    is not done) and, if asked for, `macs-SHARE.onnx`.

    **Arguments:**

    - `folder`: made if it is not there.
    - `settings`: JSON-able; all that the children depend on but their shares. A folder holds one family.
    - `model`: the uncut network, on the device that computes. It stays as it is.
    - `data`: whose test images the networks are measured on.
    """

    folder: Path
    settings: Mapping[str, Any]
    model: nn.Module
    data: ImageData
    _told: Tensor | None = field(default=None, init=False)

    def check(self) -> None:
        """Nothing, if the folder is free or holds children of this family.

        **Raises:** `RecordError` if it holds another family, or other files.
        """
        if not (self.folder / FILE).exists():
            if self.folder.is_dir() and any(self.folder.glob("[!.]*")):
                raise RecordError(f"{self.folder} is not empty and holds no family; give another --out")
            return
        there, here = read(self.folder / FILE)["settings"], self._plain_settings
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                raise RecordError(
                    f"{self.folder} holds another family ({key} is {there.get(key)!r} there, {here.get(key)!r} "
                    "here); give another --out, or --overwrite"
                )

    def clear(self) -> None:
        """Remove the family that the folder holds."""
        if (self.folder / FILE).exists():
            for path in self.folder.glob("*macs-*"):
                path.unlink()
            (self.folder / FILE).unlink()

    def make(self, shares: Sequence[float], making: Making) -> dict[str, Any]:
        """Make the children that are missing, time all that are there, and write it down.

        **Returns:** the family: `settings`, `uncut` and `children` (records, largest first), `timing`.

        **Raises:** what `check` and `filterfold.shrink` do.
        """
        self.check()
        missing = [share for share in shares if not self.file(share, "json").exists()]
        if missing:
            self._make(missing, making)
        if making.onnx:
            for share in shares:
                self._export(share)
        children = sorted((read(path) for path in self.folder.glob("macs-*.json")), key=lambda one: -one["share"])
        known = read(self.folder / FILE)
        asked = [[UNCUT, *(child["name"] for child in children)], list(making.batch_sizes)]
        if known.get("timed") != asked:
            networks = {UNCUT: self.model} | {child["name"]: self.load(child["share"]) for child in children}
            timing = measure_latency(networks, self._example, batch_sizes=making.batch_sizes)
            timed = {"timed": asked, "timing": {**timing.to_dict(), "environment": describe(str(self._device))}}
            known = {"settings": known["settings"], "uncut": self._figures(self.model), **timed}
            write_json(self.folder / FILE, known)
        return {**known, "children": children}

    def load(self, share: float) -> nn.Module:
        """A finished child."""
        return load(self.file(share, "safetensors"), copy.deepcopy(self.model), device=self._device)

    def file(self, share: float, kind: str) -> Path:
        """Where a child's network, record or ONNX file lies."""
        return self.folder / f"macs-{share:g}.{kind}"

    def _make(self, shares: Sequence[float], making: Making) -> None:
        notes: dict[str, Any] = {}

        def train(child: Child) -> None:
            assert making.train is not None
            notes.update(before_training=self._figures(child.network))
            making.train(child, self._checkpoint(child.share), notes)

        shrinking = dict(making.shrinking)
        if making.train is not None:
            shrinking["train"] = train
        children = shrink(self.model, self._example, macs=shares, **shrinking)
        if not (self.folder / FILE).exists():
            write_json(self.folder / FILE, {"settings": self._plain_settings})
        for child in children:
            self._write(child, notes)
            self._checkpoint(child.share).unlink(missing_ok=True)
            notes.clear()

    def _write(self, child: Child, notes: Mapping[str, Any]) -> None:
        """The network, and then its record."""
        before, after = child.pruned.before, child.cost
        record = {
            "name": f"{child.share:g}",
            "share": child.share,
            "macs": after.macs,
            "parameters": after.parameters,
            **self._figures(child.network),
            **notes,
            "uncut": {"macs": before.macs, "parameters": before.parameters},
            "widths": {name: list(width) for name, width in child.plan.widths.items()},
            "left_whole": dict(child.pruned.frozen),
            "repair": None if child.repair is None else str(child.repair),
            "verified": str(child.pruned.verified),
            "environment": describe(str(self._device)),
        }
        noted = input_of(self.data, self.settings.get("data_options", {}))
        named = network_of(self.settings["model"], self.settings["width"], self.data)
        about = {"share": child.share, "settings": dict(self.settings), "input": noted, **named}
        save(child.network, self.file(child.share, "safetensors"), plan=child.plan, metadata=about)
        write_json(self.file(child.share, "json"), record)
        _log.info("%s; top-1 %.2f %%, as the uncut network %.2f %%", child, record["top1"], record["agreement"])

    def _export(self, share: float) -> None:
        if not self.file(share, "onnx").exists():
            to_onnx(self.load(share).cpu(), self.data.example, self.file(share, "onnx"))

    def _figures(self, model: nn.Module) -> dict[str, Any]:
        """Work, and on the test images accuracy and agreement with the uncut network, in percent."""
        if self._told is None:
            self._told = predicted(self.model, self.data.test)
        told = self._told if model is self.model else predicted(model, self.data.test)
        cost = measure(model, self._example)
        right, same = told == self.data.test.labels.to(told.device), told == self._told
        return {
            "macs": cost.macs,
            "parameters": cost.parameters,
            "top1": 100 * right.double().mean().item(),
            "agreement": 100 * same.double().mean().item(),
            "images": len(told),
        }

    @property
    def _plain_settings(self) -> Any:
        return json.loads(json.dumps(self.settings))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _example(self) -> Tensor:
        return self.data.example.to(self._device)

    def _checkpoint(self, share: float) -> Path:
        return self.folder / f".macs-{share:g}.training.safetensors"


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a family.

    **Raises:** `RecordError` if it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no dictionary")
        return found
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: can't be read ({error}); remove it, and the same command makes it anew") from error
