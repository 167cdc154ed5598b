"""What methods are called: `l1-greedy`, `online-l1+repair`. A name is parsed once, into a `Method`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...errors import ConfigError

Kind = Literal["dense", "one-shot", "scratch", "online"]


Strategy = Literal["greedy", "iterative"]


STRATEGIES: tuple[Strategy, ...] = ("greedy", "iterative")


DISTILL = 0.3
"""Weight of the teacher in `+distill` where it is the network before the first cut of an online method."""


ADDITIONS: Mapping[str, Mapping[str, Any]] = {
    "repair": {"remedy": "kernels"},
    "distill": {"distill": DISTILL},
    "early": {"schedule": "early"},
    "longer": {},
    "centripetal": {"pull": "centripetal", "strength": None},
    "unpulled": {"strength": 0.0},
}
"""Additions to an online method → the options of `OnlineCallback` that they set.

They go together in any combination (`online-l1+repair+distill`), but for the last two, of which `online` takes one:
filters are brought together by the stronger rule, or not at all. `longer` trains for as many epochs as `costs.LONGER`
of the dense training pays for; `scratch` takes it as well. One-shot methods take `repair` and `distill`, `scratch`
takes `distill`."""


_OTHERS: Mapping[str, tuple[str, ...]] = {"one-shot": ("repair", "distill"), "scratch": ("distill", "longer")}
"""Additions that methods take which are not online."""


PULLS = ("centripetal", "unpulled")


@dataclass(frozen=True, slots=True)
class Method:
    """A method's name, taken apart.

    **Arguments:**

    - `kind`: `dense`: nothing is cut; `one-shot`: train, cut, retrain; `scratch`: train the small network from fresh
      weights; `online`: cut while training.
    - `criterion`: what ranks the filters; None where filters are folded or nothing is ranked.
    - `strategy`: of a `one-shot` method; None: every layer is scored on its own, and all are cut at once.
    - `long`: `dense-long` trains for as many epochs as training and retraining together, `scratch-long` for as many as
      cost what the online method costs.
    - `additions`: names in `ADDITIONS`.
    """

    kind: Kind
    criterion: str | None = None
    strategy: Strategy | None = None
    long: bool = False
    additions: tuple[str, ...] = ()

    @property
    def is_online(self) -> bool:
        """Whether the cuts happen while training."""
        return self.kind == "online"

    @property
    def is_taught(self) -> bool:
        """Whether a teacher takes part in training."""
        return "distill" in self.additions

    @property
    def additions_of_time(self) -> bool:
        """Whether the number of epochs follows from what they cost."""
        return "longer" in self.additions

    @property
    def options(self) -> dict[str, Any]:
        """The options of `OnlineCallback` that the additions set."""
        return {key: value for name in self.additions for key, value in ADDITIONS[name].items()}

    @classmethod
    def parse(cls, name: str) -> Method:
        """Take a name apart.

        **Raises:** `ConfigError` for an unknown method, or additions that it does not take.

        >>> Method.parse("l1-greedy")
        Method(kind='one-shot', criterion='l1', strategy='greedy', long=False, additions=())
        >>> Method.parse("online+repair").additions
        ('repair',)
        """
        plain, *additions = name.split("+")
        known = _known()
        if plain not in known:
            close = difflib.get_close_matches(plain, known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"no method {plain!r}; {hint}")
        method = known[plain]
        for addition in additions:
            if not method.is_online and (method.long or addition not in _OTHERS.get(method.kind, ())):
                raise ConfigError(f"method {name!r}: only online methods take +{addition}")
            if addition not in ADDITIONS or additions.count(addition) > 1:
                raise ConfigError(
                    f"method {name!r}: +{addition} is not one of +{', +'.join(ADDITIONS)}, each at most once"
                )
        pulls = [addition for addition in additions if addition in PULLS]
        if len(pulls) > 1 or (pulls and plain != "online"):
            raise ConfigError(f"method {name!r}: only online takes +{pulls[-1]}, and one of +{', +'.join(PULLS)}")
        return replace(method, additions=tuple(additions))


def _known() -> dict[str, Method]:
    """All methods without additions; the criteria are those that are registered now."""
    from ...pruning.criteria import CRITERIA

    return {
        "dense": Method("dense"),
        "online": Method("online"),
        "scratch": Method("scratch"),
        "dense-long": Method("dense", long=True),
        "scratch-long": Method("scratch", long=True),
        **{name: Method("one-shot", name) for name in CRITERIA},
        **{f"online-{name}": Method("online", name) for name in (*CRITERIA, "centroid")},
        **{f"{name}-{strategy}": Method("one-shot", name, strategy) for name in CRITERIA for strategy in STRATEGIES},
    }
