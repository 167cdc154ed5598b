"""Labels: which unit every position along every axis of a tensor belongs to.

Every position along every axis of every parameter and buffer gets a label, a fresh integer. An
activation's *layout* says, for each of its axes, which labels its positions carry. Tracing only
collects pairs of labels that must go together; the connected components of those pairs are the units.

A tensor stays rectangular, so a unit is removed from it as whole slices along an axis. That is why one
label vector per axis says everything; what would make an axis ragged joins labels instead.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..plan import Role

Vector = NDArray[np.int64]


Tie = tuple[Vector, Vector]
"""Labels at equal places go together."""


Axis = tuple[Vector, ...] | None
"""One axis: its label vectors, each of the axis's length. More than one where labelled axes were
merged by a reshape. `FIXED`: no labels, the size must stay. `FREE`: no labels, the size follows."""


FIXED: Axis = ()


FREE: Axis = None


OUTPUT = "reaches the model's output"
"""The reason why the last layers are frozen."""


Layout = tuple[Axis, ...]
"""One `Axis` for each axis of a tensor."""


def same_layout(first: Layout, second: Layout) -> bool:
    """Whether two layouts of equally many axes are the same: the very same label vectors, or all fixed."""
    return all(a is b or (a == FIXED and b == FIXED) for a, b in zip(first, second, strict=True))


def _changes_like(first: Vector, second: Vector) -> bool:
    """Whether two vectors have equal labels at the same pairs of places."""
    one, other = (np.unique(vector, return_inverse=True)[1] for vector in (first, second))
    pairs = len(np.unique(np.stack([one, other]), axis=1).T)
    return bool(pairs == one.max() + 1 == other.max() + 1)


@dataclass(frozen=True, slots=True)
class AxisLabels:
    """The labels `start … start + size - 1` stand for the positions along `tensor`'s `axis`."""

    tensor: str
    axis: int
    start: int
    size: int


@dataclass(slots=True)
class LabelTable:
    """Everything that a trace finds out about labels.

    `joins`: labels at equal places go together; `frozen`, `inexact`: labels and why; `summed`: labels that are summed
    over together with others of the network's making, and where; `alive`: labels of values that are no zeros where
    their layer gives zeros; `ordered`: labels whose order matters; `blocks`: rows of labels that must keep equally
    many each; `roles`: by an axis's first label.
    `pieces`: labels that were cut out of an axis by position; the units in it are of another class than
    the rest. `maybe`: axes of raw parameters that were multiplied like filters, but may
    as well stand for positions in an image; those that turn out frozen are no channels.
    """

    axes: list[AxisLabels] = field(default_factory=list)
    roles: dict[int, Role] = field(default_factory=dict)
    joins: list[tuple[Vector, Vector]] = field(default_factory=list)
    frozen: list[tuple[Vector, str]] = field(default_factory=list)
    inexact: list[tuple[Vector, str]] = field(default_factory=list)
    summed: list[tuple[Vector, str]] = field(default_factory=list)
    alive: list[Vector] = field(default_factory=list)
    ordered: list[Vector] = field(default_factory=list)
    maybe: set[int] = field(default_factory=set)
    blocks: list[Vector] = field(default_factory=list)
    pieces: list[Vector] = field(default_factory=list)
    size: int = 0
    _starts: list[int] = field(default_factory=list)
    _constants: list[tuple[int, int]] = field(default_factory=list)

    def add(self, tensor: str, shape: Sequence[int]) -> Layout:
        """Fresh labels for all axes of a parameter or buffer."""
        layout: list[Axis] = []
        for axis, size in enumerate(shape):
            self.axes.append(AxisLabels(tensor, axis, self.size, size))
            self._starts.append(self.size)
            layout.append((np.arange(self.size, self.size + size),))
            self.size += size
        return tuple(layout)

    def constants(self, count: int, reason: str) -> Vector:
        """Fresh frozen labels for positions that no parameter makes, such as padding."""
        vector = np.arange(self.size, self.size + count)
        self._constants.append((self.size, self.size + count))
        self.size += count
        self.frozen.append((vector, reason))
        return vector

    def is_constant(self, vector: Vector) -> NDArray[np.bool_]:
        """Which labels came from `constants`."""
        found = np.zeros(len(vector), dtype=bool)
        for start, stop in self._constants:
            found |= (vector >= start) & (vector < stop)
        return found

    def _owners(self, vector: Vector) -> list[AxisLabels]:
        """The parameter axes that labels come from; nearly always the whole of one."""
        entry = self.axes[bisect_right(self._starts, vector[0]) - 1]
        if vector[0] == entry.start and len(vector) == entry.size and vector[-1] == entry.start + entry.size - 1:
            return [entry]
        places = np.searchsorted(self._starts, vector, side="right") - 1
        return [self.axes[place] for place in np.unique(places)]

    def join(self, first: Vector, second: Vector) -> None:
        """The labels at equal places (after broadcasting) go together."""
        if first is not second:
            self.joins.append((first, second))

    def join_axes(self, axes: Iterable[Axis], where: str) -> Axis:
        """Axes of equal size that are the same axis from now on; the result is that axis.

        A labelled axis that meets a fixed one is frozen; a free one follows whatever it meets.
        """
        present = [axis for axis in axes if axis is not None]
        labelled = [axis for axis in present if axis]
        if not labelled:
            return FIXED if present else FREE
        first = max(labelled, key=len)
        for axis in labelled:
            if axis is not first:
                self._join_merged(first, axis, f"meets an axis merged in another way at {where}")
        if len(labelled) < len(present):
            self.freeze(first, f"must keep the size of a fixed axis at {where}")
            return FIXED
        return first

    def _join_merged(self, finer: Axis, coarser: Axis, reason: str) -> None:
        """Join axes that may hold different numbers of label vectors, as (C, kh, kw), (C, kh·kw) and (C·kh·kw) do.

        Vectors that change at the same places mean the same; the first of one also stands for one whose labels are
        all different. What is left over can't be cut.
        """
        left = list(finer or ())
        rest: list[Vector] = []
        for vector in coarser or ():
            same = len(finer or ()) == len(coarser or ())
            partner = next((v for v in left if same or _changes_like(v, vector)), None)
            if partner is None:
                rest.append(vector)
            else:
                self.join(partner, vector)
                left = [v for v in left if v is not partner]
        if len(left) > 0 and len(rest) == 1 and len(coarser or ()) == 1:
            self.join(left.pop(0), rest.pop())
        self.freeze((*left, *rest), reason)

    def freeze(self, axis: Axis, reason: str) -> None:
        """None of the axis's labels may be cut."""
        for vector in axis or ():
            self.frozen.append((vector, reason))

    def mark_inexact(self, axis: Axis, reason: str, *, ordered: bool = False) -> None:
        """Removing the axis's labels is not the same as masking them (`ordered`: their order matters too)."""
        for vector in axis or ():
            self.inexact.append((vector, reason))
            if ordered:
                self.ordered.append(vector)

    def mark_summed(self, axis: Axis, reason: str) -> None:
        """No kernel reads the axis's labels, so none can be masked; but those that are zero add nothing to a sum."""
        self.summed += [(vector, reason) for vector in axis or ()]

    def keep_balanced(self, vector: Vector, parts: int) -> None:
        """The `parts` equal stretches of the vector must keep equally many positions each."""
        self.blocks.append(vector.reshape(parts, -1))

    def assign(self, axis: Axis, role: Role, *, maybe: bool = False) -> None:
        """The parameter axis that these labels come from plays this role.

        An axis that makes channels and also reads them (a tied weight) counts as making them.
        """
        for vector in axis or ():
            for entry in self._owners(vector):
                before = self.roles.get(entry.start)
                if maybe and before is None:
                    self.maybe.add(entry.start)
                if before in (None, role, "scale"):
                    self.roles[entry.start] = role
                elif "kernel" in (before, role):
                    self.roles[entry.start] = role if before == "kernel" else before
                    self.mark_inexact(axis, f"{entry.tensor} both makes and reads them")
