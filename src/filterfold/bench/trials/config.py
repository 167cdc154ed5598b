"""What is to be run: a setting that all trials share, a trial, and the comparison, which is many trials.

Everything here is plain values. A trial's name comes from its content, so the same trial has the same name in
every folder and on every machine, and a comparison can be taken up again by whoever has its folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from ...errors import ConfigError, RecordError
from ...utils.io import write_json

FORMAT = 1


FILE = "comparison.json"


HALF = 0.5
"""What online methods keep where nothing else is asked for."""


DENSE = "dense"


ONLINE = "online"


ONLINE_PREFIX = "online-"


SCRATCH = "scratch"


SCRATCH_LONG = "scratch-long"


DENSE_LONG = "dense-long"


COMPARED = (DENSE, "l1", ONLINE)


CONTROLS = (DENSE_LONG, "random", SCRATCH, "online-l1")
"""What is compared unless something else is asked for, and what a gain must be held against: training the dense
network as long as those that are trained again, dropping filters by chance, the small network from fresh weights, and
the schedule of the online method with the original criterion."""


STRATEGIES = ("greedy", "iterative")
"""Ends of a criterion's method name: `l1-greedy`, `l1-iterative`; see `filterfold.bench.trials.methods`."""


PULLS: Mapping[str, Mapping[str, Any]] = {
    "centripetal": {"pull": "centripetal", "strength": None},
    "unpulled": {"strength": 0.0},
}
"""Additions to `online` → how filters are then brought together: by the stronger rule, or not at all."""


ADDITIONS = ("repair", "distill", "early", "longer", *PULLS)
"""What an online method may have added, in any combination (`online-l1+repair+distill`): the next layers' kernels
repaired after every cut; the network as it was before the first cut as a teacher; the cuts of `Schedule.early`; as many
epochs as `LONGER` of the dense training pays for, which `scratch` may have as well; `PULLS`, one of them."""


DISTILL = 0.3
"""Weight of the teacher in `+distill`."""


LONGER = 0.7
"""Share of the dense training's multiply-accumulates that a trial with `+longer` may cost."""


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
class Setting:
    """What all trials of a comparison have in common.

    **Arguments:**

    - `model`, `width`: name for `zoo.build`, and its width multiplier.
    - `data`, `data_options`: source and keyword arguments for `data.load`.
    - `recipe`: fields of `training.Recipe`, all but the seed, which is the trial's.
    - `retrain_epochs`, `retrain_lr`: training after a one-shot cut, at a constant learning rate. Li et al. 2017, §4:
      .001, 40 epochs on CIFAR-10.
    - `round_to`: kept widths are multiples of this.
    - `online`: options for `OnlineFilterClustering` other than the number of clusters.
    - `shares`: layer or pattern → share of the filters that stays, for methods that cut afterwards and are given none.
    - `follow`: `shortcut`, or None; see `criteria.score`.
    - `retrain`, `scratch`: fields of `training.Recipe` in which retraining, and training the small network from
      scratch, differ from a constant `retrain_lr`, and from `recipe`.
    - `weights`: file with the dense network's weights, which is then not trained.
    """

    model: str
    data: str
    width: float = 1.0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    retrain_epochs: int = 40
    retrain_lr: float = 0.001
    round_to: int = 1
    online: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    follow: str | None = None
    retrain: Mapping[str, Any] = field(default_factory=dict)
    scratch: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name, value, good in (
            ("width", self.width, self.width > 0),
            ("retrain_epochs", self.retrain_epochs, self.retrain_epochs >= 0),
            ("retrain_lr", self.retrain_lr, self.retrain_lr > 0),
            ("round_to", self.round_to, self.round_to >= 1),
        ):
            if not good:
                raise ConfigError(f"{name} = {value:g} makes no sense here")


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
      `online…+repair`, `online…+distill`: with additions (see `ADDITIONS`).
    - `seed`: of the initial weights, the batches, and the augmentation.
    - `clusters`: filters that stay in every layer (online methods), or None.
    - `keep`: share of the filters that stays, or None (criteria: the paper's own widths where it gives some, else
      half).
    - `macs`: share of the multiply-accumulates that stays, or None. `online` then chooses each layer's width; the
      others keep the same share of every layer.

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

    def __post_init__(self) -> None:
        """Refuse unknown methods, and budgets that make no sense."""
        _check_method(self.method)
        for name, share in (("keep", self.keep), ("macs", self.macs)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} = {share:g}: the share that stays must be over 0 and at most 1")
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"clusters = {self.clusters}: at least one filter must stay in every layer")
        given = [budget for budget in (self.clusters, self.keep, self.macs) if budget is not None]
        if self.is_online and len(given) != 1:
            raise ConfigError(f"method {self.method!r} needs one of clusters, keep and macs")
        if not self.is_online and self.clusters is not None:
            raise ConfigError(f"method {self.method!r} takes no number of clusters; give a share to keep")
        if self.method in (DENSE, DENSE_LONG) and given:
            raise ConfigError(f"method {self.method!r} cuts nothing, so it takes no share to keep")
        if len(given) > 1:
            raise ConfigError(f"method {self.method!r}: give a share of the filters or of the MACs to keep, not both")

    @property
    def plain(self) -> str:
        """The method without its additions."""
        return self.method.partition("+")[0]

    @property
    def additions(self) -> tuple[str, ...]:
        """What is added to the method; see `ADDITIONS`."""
        return tuple(self.method.split("+")[1:])

    @property
    def schedule(self) -> Any:
        """When an online method cuts: a name, or what `Schedule.to_dict` gives."""
        return "early" if "early" in self.additions else self.setting.online.get("schedule", "gradual")

    @property
    def is_online(self) -> bool:
        """Whether the cuts happen while training."""
        return self.plain == ONLINE or self.plain.startswith(ONLINE_PREFIX)

    @property
    def criterion(self) -> str | None:
        """The criterion that ranks filters, or None where filters are folded or nothing is cut."""
        if self.plain in (DENSE, DENSE_LONG, ONLINE, SCRATCH, SCRATCH_LONG):
            return None
        if self.strategy:
            return self.method.removesuffix(f"-{self.strategy}")
        return self.plain.removeprefix(ONLINE_PREFIX)

    @property
    def strategy(self) -> str | None:
        """`greedy` or `iterative`, or None: cut at once, every layer scored on its own."""
        return None if self.is_online else next((name for name in STRATEGIES if self.method.endswith(f"-{name}")), None)

    @property
    def label(self) -> str:
        """The name of the group of trials that differ from this one by the seed only."""
        budgets = (("k", self.clusters), ("keep", self.keep), ("macs", self.macs))
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
        return replace(self, method=DENSE, clusters=None, keep=None, macs=None)

    @property
    def options(self) -> dict[str, Any]:
        """All that is not method, model, data, and seed."""
        shared = asdict(self.setting)
        later = ("shares", "follow", "retrain", "scratch", "weights")  # left out where unused: ids stay as they were
        shown = (key for key in shared if key not in ("model", "data") and (key not in later or shared[key]))
        macs = {} if self.macs is None else {"macs": self.macs}
        return {"keep": self.keep} | macs | {key: shared[key] for key in shown}

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
        keep, macs = options.pop("keep"), options.pop("macs", None)
        setting = Setting(model=document["model"], data=document["data"], **options)
        return cls(document["method"], document["seed"], setting, document["clusters"], keep, macs)


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

    def claim(self, folder: Path, command: str | None = None, *, ours: bool = False) -> None:
        """Take a run folder for this comparison, or take it up again.

        More trials of the same setting (further seeds, methods, numbers of clusters) may join a folder.

        **Arguments:**

        - `command`: noted as the way to redo this.
        - `ours`: whether the folder is known to be a run folder, whatever else lies in it.

        **Raises:** `RecordError` if the folder holds another comparison, or files that are none of ours.
        """
        path = Path(folder) / FILE
        entries = {trial.id: _budget(trial) for trial in self.trials}
        if path.exists():
            found = description(Path(folder))
            difference = _difference(found["setting"], json.loads(json.dumps(asdict(self.setting))))
            if difference:
                raise RecordError(f"{folder} holds a different comparison ({difference}); give another folder")
            entries = found["trials"] | entries
        elif not ours and Path(folder).is_dir() and any(Path(folder).glob("[!.]*")):
            raise RecordError(f"{folder} is not empty and holds no comparison; give another folder")
        document = {"format": FORMAT, "setting": asdict(self.setting), "trials": entries, "command": command}
        write_json(path, document)


def plan(
    setting: Setting,
    methods: Sequence[str],
    *,
    clusters: Iterable[int] = (),
    keep: Iterable[float] = (),
    macs: Iterable[float] = (),
    seeds: Iterable[int] = range(5),
) -> Comparison:
    """The trials of a comparison, seed by seed, so that a comparison that is stopped early is still balanced.

    **Arguments:**

    - `methods`: see `Trial`.
    - `clusters`: numbers of clusters; online methods run once with each.
    - `keep`, `macs`: shares of the filters, of the multiply-accumulates to keep; every method that cuts runs once with
      each. Without any, the criteria keep their own default; without `clusters` either, the online methods keep half.

    >>> [t.label for t in plan(Setting("m", "d"), ["dense", "l1", "online"], clusters=[5, 10], seeds=[0]).trials]
    ['dense', 'l1', 'online k=5', 'online k=10']
    """
    counts = list(clusters)
    shares: list[dict[str, Any]] = [*({"keep": share} for share in keep), *({"macs": share} for share in macs)]
    trials = [
        Trial(method, seed, setting, **budget)
        for seed in seeds
        for method in dict.fromkeys(methods)
        for budget in _budgets(method, counts, shares)
    ]
    return Comparison(setting, tuple({trial.id: trial for trial in trials}.values()))


def _budgets(method: str, clusters: Sequence[int], shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a method is to cut down to, once for each trial of a seed."""
    if method in (DENSE, DENSE_LONG):
        return [{}]
    if method == ONLINE or method.startswith(ONLINE_PREFIX):
        return [{"clusters": count} for count in clusters] + shares or [{"keep": HALF}]
    return shares or [{}]


def _check_method(method: str) -> None:
    from ...pruning.criteria import CRITERIA

    whole, (method, *additions) = method, method.split("+")
    online = method in (ONLINE, f"{ONLINE_PREFIX}centroid") or (
        method.startswith(ONLINE_PREFIX) and method.removeprefix(ONLINE_PREFIX) in CRITERIA
    )
    for name in additions:
        if not online and (method, name) != (SCRATCH, "longer"):
            raise ConfigError(f"method {whole!r}: only online methods take additions (+{name})")
        if name not in ADDITIONS or additions.count(name) > 1:
            raise ConfigError(f"method {whole!r}: +{name} is not one of +{', +'.join(ADDITIONS)}, each at most once")
    pulls = [name for name in additions if name in PULLS]
    if len(pulls) > 1 or (pulls and method != ONLINE):
        raise ConfigError(f"method {whole!r}: online alone pulls filters together, in one way (+{pulls[-1]})")
    plain = next((method.removesuffix(f"-{name}") for name in STRATEGIES if method.endswith(f"-{name}")), method)
    if online or plain in CRITERIA or method in (DENSE, DENSE_LONG, SCRATCH, SCRATCH_LONG):
        return
    known = [DENSE, ONLINE, SCRATCH, DENSE_LONG, *CRITERIA, *(f"{ONLINE_PREFIX}{name}" for name in CRITERIA)]
    close = difflib.get_close_matches(method, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known[: 4 + len(CRITERIA)])}"
    raise ConfigError(f"no method {method!r}; {hint}")


def _budget(trial: Trial) -> dict[str, Any]:
    macs = {} if trial.macs is None else {"macs": trial.macs}
    return {"method": trial.method, "seed": trial.seed, "clusters": trial.clusters, "keep": trial.keep} | macs


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


def _difference(there: Any, here: Any, where: str = "") -> str | None:
    """The first place where two trees of plain values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{where}.{key}" if where else key
            if difference := _difference(there.get(key), here.get(key), inner):
                return difference
        return None
    return None if there == here else f"{where} is {there!r} there, {here!r} here"
