"""The registry of criteria."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ...plan import ChannelGroup
from ...utils.arguments import typed

Evidence = Mapping[str, Tensor]


Function = Callable[..., Tensor]


Batch = tuple[Any, Any]
"""(inputs, targets); targets are None where the loader gives inputs alone."""


Gather = Callable[[nn.Module, Sequence[ChannelGroup], Iterable[Batch], Callable[..., Tensor]], Evidence]
"""gather(model, groups, batches, loss) → what the criterion reads instead of the weights."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """A way to score units.

    **Arguments:**

    - `name`: what it is called in the registry.
    - `function`: `function(group, evidence)` → scores of shape `(size,)`, higher = keep. It may also
      take `combine` (how scores of coupled layers become one) and `seed`.
    - `gather`: makes the evidence from data; without it the evidence is the model's parameters and
      buffers by name.
    - `across_layers`: whether the scores of different layers say the same, so that a budget of the MACs may choose the
      widths of layers by them.
    """

    name: str
    function: Function
    gather: Gather | None = None
    across_layers: bool = False

    def __call__(self, group: ChannelGroup, evidence: Evidence, **options: Any) -> Tensor:
        """The scores of one group; options that the function does not take are left out."""
        return self.function(group, evidence, **{key: options[key] for key in options if self.takes(key)})

    def takes(self, option: str) -> bool:
        """Whether the function has an argument of that name."""
        return option in _arguments(self.function)


@lru_cache
def _arguments(function: Function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


CRITERIA: dict[str, Criterion] = {}


@typed
def criterion(
    name: str, *, gather: Gather | None = None, across_layers: bool = False
) -> Callable[[Function], Function]:
    """Register a criterion: the decorated function can then be named wherever a criterion is asked for.

    **Arguments:** those of `Criterion`, of which the decorated function is the `function`.

    **Raises:** `ConfigError` if the name is taken.

    ```python
    >>> @criterion("bias-size")
    ... def bias_size(group, tensors):
    ...     return tensors[f"{group.name}.bias"].abs()
    >>> CRITERIA.pop("bias-size").name
    'bias-size'

    ```
    """

    def register(function: Function) -> Function:
        if name in CRITERIA:
            raise ConfigError(f"criterion {name!r} exists already; choose another name")
        CRITERIA[name] = Criterion(name, function, gather, across_layers)
        return function

    return register


def resolve(choice: str | Function | Criterion) -> Criterion:
    """The criterion of that name, or a function made into one."""
    if isinstance(choice, Criterion):
        return choice
    if callable(choice):
        known = (entry for entry in CRITERIA.values() if entry.function is choice)
        return next(known, Criterion(getattr(choice, "__name__", "criterion"), choice))
    if choice not in CRITERIA:
        close = difflib.get_close_matches(str(choice), CRITERIA, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(CRITERIA)}"
        raise ConfigError(f"criterion {choice!r} is unknown; {hint}")
    return CRITERIA[choice]
