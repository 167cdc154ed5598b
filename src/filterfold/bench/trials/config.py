"""What is to be run: a setting that all trials share, a trial, and the comparison, which is many trials.

Everything here is plain values. A trial's name comes from its content, so the same trial has the same name in
every folder and on every machine, and a comparison can be taken up again by whoever has its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from ...errors import ConfigError, RecordError
from ...utils.io import write_json
from .method_names import Method
from .setting import Setting, without_unused

FORMAT = 1


FILE = "comparison.json"


HALF = 0.5
"""The share of the filters that online methods keep unless another budget is given."""


COMPARED = ("dense", "l1", "online")


CONTROLS = ("dense-long", "random", "scratch", "online-l1")
"""What `compare` runs by default, and the controls that a gain must be held against: the dense network trained for as
long as the retrained ones, filters dropped by chance, the small network from fresh weights, and the schedule of the
online method with the original criterion."""


Teacher = Literal["file", "before the cut", "at the start", "before the first cut"]


class Described(TypedDict):
    """The entries of a record that say which trial it is of."""

    method: str
    label: str
    clusters: int | None
    model: str
    data: str
    seed: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """One training run with one method and one seed.

    **Arguments:**

    - `method`: `dense`; `dense-long`: dense for as many epochs as training and retraining together; a criterion's
      name (`l1`, `random`, …): train, cut in one shot, retrain; `l1-greedy`, `l1-iterative`: its variants;
      `scratch`: the small network from fresh weights, for as many epochs as the dense one; `scratch-long`: for as
      many as cost what the online method costs; `online`: fold clusters while training;
      `online-<criterion>`: the same schedule, but drop by that criterion;
      `online-centroid`: the same, but replace filters by their cluster's mean and remove none;
      `online…+repair`, `online…+distill`: with additions (see `method_names.ADDITIONS`); `l1+distill`,
      `scratch+distill`: with a teacher, too.
    - `seed`: of the initial weights, the batches, and the augmentation.
    - `clusters`: filters that stay in every layer (online methods), or None.
    - `keep`: share of the filters that stays, or None (criteria: the paper's own widths where it gives some, else
      half).
    - `macs`: share of the multiply-accumulates that stays, or None. `online` then chooses each layer's width; the
      others keep the same share of every layer.
    - `epochs`: of its training, where the trials of a comparison differ in it; None: those of the setting's recipe.
      0: cut but not trained.

    >>> trial = Trial("online", 0, Setting("vgg_small", "digits"), clusters=10)
    >>> trial.label, trial.id
    ('online k=10', 'online-k10-s0-...')
    """

    method: str
    seed: int
    setting: Setting
    clusters: int | None = None
    keep: float | None = None
    macs: float | None = None
    epochs: int | None = None
    parsed: Method = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Parse the method; refuse unknown ones, and budgets that make no sense."""
        object.__setattr__(self, "parsed", Method.parse(self.method))
        for name, share in (("keep", self.keep), ("macs", self.macs)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} = {share:g}: the share that stays must be over 0 and at most 1")
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"clusters = {self.clusters}: at least one filter must stay in every layer")
        given = [budget for budget in (self.clusters, self.keep, self.macs) if budget is not None]
        if self.parsed.is_online and len(given) != 1:
            raise ConfigError(f"method {self.method!r} needs one of clusters, keep and macs")
        if not self.parsed.is_online and self.clusters is not None:
            raise ConfigError(f"method {self.method!r} takes no number of clusters; give a share to keep")
        if self.parsed.kind == "dense" and given:
            raise ConfigError(f"method {self.method!r} cuts nothing, so it takes no share to keep")
        if self.parsed.is_taught and self.teacher is None:
            raise ConfigError(f"method {self.method!r}: no network is cut that could teach; give --teacher FILE")
        if self.epochs is not None and self.epochs < 0:
            raise ConfigError(f"epochs = {self.epochs}: at least 0")
        if self.epochs == 0 and (self.parsed.kind == "one-shot" or self.parsed.long or self.parsed.additions_of_time):
            raise ConfigError(f"method {self.method!r} trains: 0 epochs are for dense, scratch and online methods")
        if len(given) > 1:
            raise ConfigError(f"method {self.method!r}: give a share of the filters or of the MACs to keep, not both")

    @property
    def teacher(self) -> Teacher | None:
        """Who teaches a method with `+distill`: the network of a file; else that before the cut of a one-shot method.

        Of an online method it is the network that training starts with, or, where that knows nothing of these classes
        (fresh weights, a new classifier), the one before the first cut, from then on.
        """
        if "teacher" in self.setting.distill:
            return "file"
        if self.parsed.kind != "online":
            return "before the cut" if self.parsed.kind == "one-shot" else None
        knows = self.setting.begins.given and not self.setting.begins.new_head
        return "at the start" if knows else "before the first cut"

    @property
    def online_options(self) -> dict[str, Any]:
        """Options for `OnlineCallback`: the setting's, changed by the method's additions."""
        options = {"schedule": "gradual", **self.setting.online, **self.parsed.options}
        if self.parsed.is_taught and self.teacher == "before the first cut":
            names = {"weight": "distill", "temperature": "temperature"}
            return options | {names[key]: value for key, value in self.setting.distill.items()}
        return {key: value for key, value in options.items() if not (key == "distill" and self.parsed.is_taught)}

    @property
    def label(self) -> str:
        """The name of the group of trials that differ from this one by the seed only."""
        budgets = (("k", self.clusters), ("keep", self.keep), ("macs", self.macs), ("epochs", self.epochs))
        return self.method + "".join(f" {name}={value:g}" for name, value in budgets if value is not None)

    @property
    def id(self) -> str:
        """A readable beginning, and a fingerprint of everything that the trial is."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        readable = self.label.replace(" ", "-").replace("=", "")
        return f"{readable}-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def base(self) -> Trial:
        """The dense training that this trial begins with, or would have to be compared with: same seed."""
        return replace(self, method="dense", clusters=None, keep=None, macs=None)

    @property
    def options(self) -> dict[str, Any]:
        """All that is not method, model, data, and seed."""
        shared = self.setting.to_dict()
        later = {name: value for name in ("macs", "epochs") if (value := getattr(self, name)) is not None}
        return {"keep": self.keep} | later | {key: shared[key] for key in shared if key not in ("model", "data")}

    def to_dict(self) -> Described:
        """Plain values: the beginning of the trial's record."""
        return {
            "method": self.method,
            "label": self.label,
            "clusters": self.clusters,
            "model": self.setting.model,
            "data": self.setting.data,
            "seed": self.seed,
            "options": self.options,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Trial:
        """The trial that a record is of, to be run again.

        >>> trial = Trial("l1", 3, Setting("resnet20", "cifar10", recipe={"epochs": 2}), keep=0.5)
        >>> Trial.from_dict(trial.to_dict()) == trial
        True
        """
        options = dict(document["options"])
        keep, macs, epochs = options.pop("keep"), options.pop("macs", None), options.pop("epochs", None)
        setting = Setting(model=document["model"], data=document["data"], **options)
        return cls(document["method"], document["seed"], setting, document["clusters"], keep, macs, epochs)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Trials to be compared: they have one setting."""

    setting: Setting
    trials: tuple[Trial, ...]

    def __post_init__(self) -> None:
        """Refuse a comparison of nothing, and trials that can't be compared."""
        if not self.trials:
            raise ConfigError("nothing to compare: no method, or no trial")
        if any(trial.setting != self.setting for trial in self.trials):
            raise ConfigError("the trials of a comparison must share their setting")

    @classmethod
    def of(
        cls,
        setting: Setting,
        methods: Sequence[str],
        *,
        clusters: Iterable[int] = (),
        keep: Iterable[float] = (),
        macs: Iterable[float] = (),
        epochs: Iterable[int] = (),
        seeds: Iterable[int] = range(5),
    ) -> Comparison:
        """The trials of a comparison, seed by seed, so that a comparison that is stopped early is still balanced.

        **Arguments:**

        - `methods`: see `Trial`.
        - `clusters`: numbers of clusters; online methods run once with each.
        - `keep`, `macs`: shares of the filters, of the multiply-accumulates to keep; every method that cuts runs once
          with each. Without any, the criteria keep their own default; without `clusters` either, the online methods
          keep half.
        - `epochs`: lengths of training; every method runs once with each. Without any, as long as the setting says.

        >>> found = Comparison.of(Setting("m", "d"), ["dense", "l1", "online"], clusters=[5, 10], seeds=[0])
        >>> [trial.label for trial in found.trials]
        ['dense', 'l1', 'online k=5', 'online k=10']
        """
        counts = list(clusters)
        shares: list[dict[str, Any]] = [*({"keep": share} for share in keep), *({"macs": share} for share in macs)]
        lengths: list[int | None] = [*epochs] or [None]
        trials = [
            Trial(method, seed, setting, **budget, epochs=length)
            for seed in seeds
            for length in lengths
            for method in dict.fromkeys(methods)
            for budget in _budgets(method, counts, shares)
        ]
        return cls(setting, tuple({trial.id: trial for trial in trials}.values()))

    def claim(
        self, folder: Path, command: str | None = None, *, fresh: bool = False, images: str | None = None
    ) -> None:
        """Take a run folder for this comparison, or take it up again.

        More trials of the same setting (further seeds, methods, numbers of clusters) may join a folder.

        **Arguments:**

        - `command`: noted as the way to redo this.
        - `fresh`: whether the run that the folder held has been removed.
        - `images`: fingerprint of the data set; None: that of the folder.

        **Raises:** `RecordError` if the folder holds another comparison, or files that are none of ours.
        """
        entries = self._entries if fresh else self.entries(folder)
        if not fresh and (known := images_of(folder)) is not None:
            refuse_other_images(folder, known, images or known)
            images = known
        document = {"format": FORMAT, "setting": self.setting.to_dict(), "trials": entries, "command": command}
        document |= {"images": images} if images else {}
        write_json(Path(folder) / FILE, document)

    def entries(self, folder: Path) -> dict[str, Any]:
        """The trials of a folder once this comparison has joined it: id → method, seed, budget; see `claim`."""
        if (Path(folder) / FILE).exists():
            found = description(Path(folder))
            if difference := self.difference(found):
                raise RecordError(f"{folder} holds a different comparison ({difference}); give another folder")
            return {**found["trials"], **self._entries}
        if Path(folder).is_dir() and any(Path(folder).glob("[!.]*")):
            raise RecordError(f"{folder} is not empty and holds no comparison; give another folder")
        return self._entries

    @property
    def _entries(self) -> dict[str, Any]:
        return {trial.id: _budget(trial) for trial in self.trials}

    def difference(self, found: Mapping[str, Any]) -> str | None:
        """In what the setting of a run folder's description is another one, in words."""
        there, here = without_unused(found["setting"]), json.loads(json.dumps(self.setting.to_dict()))
        difference = _difference(there, here)
        if difference and difference.startswith("start.fingerprint"):
            return f"{self.setting.weights or 'the hub'} holds other weights now: {difference}"
        return difference


def _budgets(method: str, clusters: Sequence[int], shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a method is to cut down to, once for each trial of a seed."""
    kind = Method.parse(method).kind
    if kind == "dense":
        return [{}]
    if kind == "online":
        return [{"clusters": count} for count in clusters] + shares or [{"keep": HALF}]
    return shares or [{}]


def _budget(trial: Trial) -> dict[str, Any]:
    later = {name: value for name in ("macs", "epochs") if (value := getattr(trial, name)) is not None}
    return {"method": trial.method, "seed": trial.seed, "clusters": trial.clusters, "keep": trial.keep} | later


def description(folder: Path) -> dict[str, Any]:
    """What a run folder is for: `setting`, `trials` (id → method, seed, budget), `command`.

    **Raises:** `RecordError` if it holds no comparison, or a damaged one.
    """
    path = folder / FILE
    if not path.exists():
        raise RecordError(f"{folder}: no comparison there; give the run folder of a compare, demo or train")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise RecordError(f"{path}: format {document['format']!r} is not {FORMAT}: written by another version?")
        if not isinstance(document["setting"], dict) or not isinstance(document["trials"], dict):
            raise TypeError("setting and trials must be objects")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RecordError(f"{path}: not a comparison's description ({error}); give another folder") from error
    return document


def images_of(folder: Path) -> str | None:
    """Fingerprint of the data set that the trials of a run folder see; None: no run, or the first versions' did."""
    return description(folder).get("images") if (folder / FILE).exists() else None


def refuse_other_images(where: Path | str, known: str, found: str) -> None:
    """Refuse images or labels that are not those that runs began with.

    **Raises:** `RecordError`.
    """
    if found != known:
        raise RecordError(
            f"{where}: the images or labels are not those that this was begun with: fingerprint {found}, {known} then; "
            "give another folder"
        )


def _difference(there: Any, here: Any, where: str = "") -> str | None:
    """The first place where two trees of plain values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{where}.{key}" if where else key
            if difference := _difference(there.get(key), here.get(key), inner):
                return difference
        return None
    return None if there == here else f"{where} is {there!r} there, {here!r} here"
