"""Options as objects: what is to remain, what draws filters together, how a milestone cuts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal

from ..errors import ConfigError
from ..pruning.budgets.patterns import check_counts, check_one_budget, check_shares
from ..pruning.criteria import CRITERIA
from ..utils.arguments import check_fields
from .folding import Features

FOLD, CENTROID = "fold", "centroid"


@dataclass(frozen=True, slots=True)
class Target:
    """What is to remain in the end; exactly one of clusters, keep, threshold and macs.

    **Arguments:**

    - `clusters`: units in every group, or name or glob pattern → units; a group with fewer keeps them.
    - `keep`: share of the units kept in every group, or name or pattern → share. In mappings the last pattern that
      matches counts, and groups that none matches stay whole.
    - `threshold`: cosine similarity above which filters fold together.
    - `macs`: share of the multiply-accumulates that may remain; groups that cluster well then give more units, or, with
      a method whose scores of different layers say the same (`reconstruction`), the units of lowest score go first.
    - `round_to`: widths are multiples of this, as in `filterfold.pruning.budgets.Selection`. None: of 16 in groups that
      began with 128 units or more; with `clusters`, which are taken at their word, 1.
    - `min_keep`, `ignore`: as in `Selection`.
    """

    clusters: int | Mapping[str, int] | None = None
    keep: float | Mapping[str, float] | None = None
    threshold: float | None = None
    macs: float | None = None
    round_to: int | None = None
    min_keep: int = 1
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        check_one_budget(*({name: getattr(self, name)} for name in ("clusters", "keep", "threshold", "macs")))
        check_shares(keep=self.keep, macs=self.macs)
        check_counts(clusters=self.clusters, round_to=self.round_to, min_keep=self.min_keep)
        if self.threshold is None:
            return
        if isinstance(self.threshold, bool) or not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold}: a cosine similarity lies in [-1, 1]")
        for name, usual in (("round_to", None), ("min_keep", 1)):
            if getattr(self, name) != usual:
                raise ConfigError(f"{name}= has no effect with threshold=: leave it out")


_STRENGTH = {"cosine": 1e-3, "centripetal": 0.05, "none": 0.0}


@dataclass(frozen=True, slots=True)
class Pull:
    """What brings the filters of a cluster together.

    **Arguments:**

    - `kind`: "cosine", a term in the loss that turns them (see `pull`); "centripetal", the stronger one: call
      `merge_gradients()` between backward and the optimizer's step, and they become identical, so that the fold is
      lossless (see `centripetal_pull.py`); or "none".
    - `strength`: λ of the term (default .001), or ε of the centripetal rule (default .05, the authors' for ImageNet):
      learning rate × ε × steps, over 1 - momentum, should come to 10 or more.

    >>> Pull("centripetal").strength
    0.05
    """

    kind: Literal["cosine", "centripetal", "none"] = "cosine"
    strength: float | None = None

    def __post_init__(self) -> None:
        """Refuse unknown kinds; put in the usual strength."""
        check_fields(self)
        if self.kind not in _STRENGTH:
            raise ConfigError(f"unknown pull {self.kind!r}: {' or '.join(_STRENGTH)}")
        if self.strength is None:
            object.__setattr__(self, "strength", _STRENGTH[self.kind])
        elif self.kind == "none" and self.strength:
            raise ConfigError("strength= has no effect with pull='none': leave it out")
        elif isinstance(self.strength, bool) or not (isfinite(self.strength) and self.strength >= 0):
            raise ConfigError(f"strength={self.strength}: a pull can't be negative, and must be a number")


Remedy = Literal["norms", "kernels"]


def check_remedy(remedy: str | None) -> None:
    """Refuse a remedy that there is not."""
    if remedy not in (None, "norms", "kernels"):
        raise ConfigError(f"unknown remedy {remedy!r}: norms or kernels")


@dataclass(frozen=True, slots=True)
class CutOptions:
    """How a milestone cuts.

    **Arguments:**

    - `features`: compare "units", filters by direction with their batch norm's scale and shift where these are
      clearly theirs (folds far better once trained), or "filters" alone, as the original description has it.
    - `remedy`: after each cut, measure batch norms anew ("norms"), or repair the next layers' kernels as well
      ("kernels", see `filterfold.pruning.reconstruction`), of averaged copies likewise. None: leave it to training.
    - `loader`: a few batches, for criteria that need data, and for remedies.
    - `seed`: of k-means and random scores.
    - `verify`: hold every cut against the masked network before it is made.
    """

    features: Features = "units"
    remedy: Remedy | None = None
    loader: Iterable[Any] | None = None
    seed: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        """Refuse what does not exist, and a remedy without the batches that it needs."""
        check_fields(self)
        if self.features not in ("units", "filters"):
            raise ConfigError(f"unknown features {self.features!r}: units or filters")
        check_remedy(self.remedy)
        if self.remedy is not None and self.loader is None:
            raise ConfigError(f"remedy={self.remedy!r} needs a loader with a few batches of training images")


def check_method(method: str, target: Target, pull: Pull) -> None:
    """Refuse unknown methods, and options that have no effect with a method."""
    if method not in (FOLD, CENTROID) and method not in CRITERIA:
        raise ConfigError(f"unknown method {method!r}: fold, centroid or one of {', '.join(sorted(CRITERIA))}")
    if method not in (FOLD, CENTROID) and target.threshold is not None:
        raise ConfigError(f"a similarity threshold says nothing about how many units {method!r} keeps: give keep")
    if method != FOLD and pull.kind == "centripetal" and pull.strength:
        raise ConfigError(f"pull='centripetal' has no effect with method={method!r}: leave it out")


def as_objects(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `OnlineFilterClustering` from plain values, which can be written down.

    **Arguments:** `plain`: its own keywords, and the fields of `Pull`, `CutOptions` and `Target` by their names.

    **Raises:** `ConfigError` for a name that there is not, or a value that makes no sense.

    >>> as_objects({"keep": 0.5, "strength": 0.01, "seed": 1})["pull"]
    Pull(kind='cosine', strength=0.01)
    """
    found: dict[str, Any] = dict(plain)
    for name, kind in (("target", Target), ("cutting", CutOptions)):
        own = {field.name: found.pop(field.name) for field in fields(kind) if field.name in found}
        if own:
            found[name] = kind(**own)
    if "strength" in found:
        found["pull"] = Pull(found.pop("pull", "cosine"), found.pop("strength"))
    unknown = sorted(set(found) - {"averaged", "target", "cutting", "pull", "method"})
    if unknown:
        raise ConfigError(f"online clustering has no option {unknown[0]!r}")
    return found
