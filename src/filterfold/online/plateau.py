"""When training levels off."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Any


class Plateau:
    """Counts the epochs since a loss last became better.

    **Arguments:**

    - `patience`: after so many epochs without it the loss has levelled off.
    - `change`: what counts as better: lower than the best so far by more than this share of it.

    ```python
    >>> plateau = Plateau(patience=2, change=0.01)
    >>> [plateau.reached(loss) for loss in (1.0, 0.5, 0.499, 0.498, 0.3)]
    [False, False, False, True, False]

    ```
    """

    def __init__(self, patience: int, change: float) -> None:
        self.patience, self.change = patience, change
        self.reset()

    def reset(self) -> None:
        """Begin anew: after a cut the loss is another network's."""
        self.best: float | None = None
        self.waited = 0

    def reached(self, loss: float) -> bool:
        """Note one epoch's loss; NaN is no improvement."""
        if not isnan(loss) and (self.best is None or loss < self.best - self.change * abs(self.best)):
            self.best, self.waited = float(loss), 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Where the count stands."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited = state["best"], int(state["waited"])
