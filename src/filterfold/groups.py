"""The channel group: units of a network that are coupled by structure."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Slice


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Units that are coupled: a convolution's filters, or all filters along a residual stage.

    A *unit* is one removable channel of the whole network: every slice of every parameter and
    buffer that must go together. The group's slices say where they are.

    **Arguments:**

    - `name`: qualified name of the first layer that makes the channels, such as `layer1.0.conv1`.
    - `size`: number of units.
    - `producers`: slices that *make* the channels: weight rows, biases, batch-norm entries.
    - `consumers`: slices that *read* them: the input kernels of the next layers.
    - `exact`: whether removing a unit equals zeroing its consumer slices (masking).
    - `frozen`: why the group can't be cut, or None.
    - `classes`: shape `(size,)`: units of one class have slices of equal signature (they occur the
      same number of times in the same tensors). A plan must leave at least one unit of every class.
    - `blocks`: shape `(size,)`: every block must keep the same number of units (the groups of a
      group normalisation, say). All zero where there is no such constraint.
    - `symmetric`: whether the order of the units does not matter, so that permuting units of one
      class leaves the network's function as it is; False where a convolution slides over them.
    - `remark`: why the group is not exact, or None.
    """

    name: str
    size: int
    producers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    exact: bool
    frozen: str | None
    classes: tuple[int, ...]
    blocks: tuple[int, ...]
    symmetric: bool = True
    remark: str | None = None
