"""The plan: what a cut will do, written down before anything is touched; and what it is about: slices and groups.

A plan names tensors and units, never modules, so it can be printed, saved as JSON, compared, and
applied to any model with the same parameter names and shapes. It says for every unit the index that it
ends up in, or -1 if it is dropped; units with the same index are folded into one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from .errors import PlanError, one_line
from .utils.runs import Runs, encode

FORMAT = 1


DROPPED = -1
"""What an assignment says of a unit that is dropped."""


Role = Literal["filter", "depthwise", "bias", "norm", "scale", "kernel"]
"""What a slice is to its units: `filter` rows make the channel, `depthwise`, `bias`, `norm` and
`scale` entries ride on it, `kernel` slices of a later layer read it."""


_LARGEST = 1e30
"""Factors at or above this leave float32 together with the weights that they scale."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The positions along one axis of a parameter or buffer that belong to a group's units.

    **Arguments:**

    - `tensor`: qualified name, as in `model.named_parameters()` or `model.named_buffers()`.
    - `axis`: the axis along which the positions run.
    - `units`: one entry for each position along that axis: the unit (0 … group size - 1) that the
      position belongs to, or -1 where it belongs to no unit of this group.
    - `role`: see `Role`.
    - `weight`: for every unit the factor on its positions of this very tensor, where it differs from
      the cut's `blend` or `gain` (folded filters and their batch norms have scales of their own).
    """

    tensor: str
    axis: int
    units: tuple[int, ...]
    role: Role
    weight: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what can be no slice of any tensor."""
        where = f"slice of {self.tensor!r}"
        if type(self.tensor) is not str or type(self.axis) is not int:
            raise PlanError(f"{where}: the tensor must be a name and the axis ({self.axis!r}) a number")
        if self.role not in get_args(Role):
            raise PlanError(f"{where}: unknown role {self.role!r}: one of {', '.join(get_args(Role))}")
        _check_integers(where, "units", self.units)
        _check_factors(where, "weight", self.weight)


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
    - `zeros_vanish`: whether an inexact group's units, where their layers give zeros, change nothing by leaving: they
      are only summed over (the queries and keys of attention).
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
    zeros_vanish: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """What happens to one group.

    **Arguments:**

    - `group`: the group's name.
    - `assignment`: for every unit the new index (0 … new size - 1) that it ends up in, or -1 if it
      is dropped. Every new index occurs at least once.
    - `producers`, `consumers`: the slices that make and that read the units.
    - `blend`: for every unit its share in the new unit's producers: new row = Σ blend·row over the
      units folded into it. Defaults to the mean over the units of a new index.
    - `gain`: for every unit the factor on its consumer slices: new kernel = Σ gain·kernel. Defaults
      to 1. Dropped units take part in neither sum.
    """

    group: str
    assignment: tuple[int, ...]
    producers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    blend: tuple[float, ...] | None = None
    gain: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an assignment that is not a map onto 0 … new size - 1, and factors that are no numbers."""
        where = f"group {self.group!r}"
        if type(self.group) is not str:
            raise PlanError(f"{where}: a group's name must be text")
        _check_integers(where, "the assignment", self.assignment)
        size, used = len(self.assignment), set(self.assignment) - {DROPPED}
        new = max(used, default=DROPPED) + 1
        if not used:
            raise PlanError(f"{where}: the plan leaves no unit; keep at least one")
        missing = next((index for index in range(new) if index not in used), None)
        if missing is not None or min(used) < 0:
            what = "an index is below -1" if missing is None else f"index {missing} is never used"
            raise PlanError(f"{where}: the assignment is no map onto 0..{new - 1}: {what}")
        for name, values in (("blend", self.blend), ("gain", self.gain)):
            _check_factors(where, name, values)
            if values is not None and len(values) != size:
                raise PlanError(f"{where}: {name} has {len(values)} entries for {size} units")
        for part in (*self.producers, *self.consumers):
            if max(part.units, default=DROPPED) >= size:
                raise PlanError(f"group {self.group!r}: {part.tensor} names unit {max(part.units)} of only {size}")
            if part.weight is not None and len(part.weight) != size:
                raise PlanError(f"group {self.group!r}: {part.tensor} has {len(part.weight)} weights for {size} units")

    @property
    def size(self) -> int:
        """Number of units before the cut."""
        return len(self.assignment)

    @property
    def new_size(self) -> int:
        """Number of units after the cut."""
        return max(self.assignment) + 1

    @property
    def changes(self) -> bool:
        """Whether anything is dropped, folded, or reordered."""
        return self.assignment != tuple(range(self.size))

    @property
    def folds(self) -> bool:
        """Whether some new unit is made of more than one old unit."""
        kept = [index for index in self.assignment if index != DROPPED]
        return len(kept) > self.new_size


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """A size written into the model's own code that must change with the cut: `module.attribute = new`.

    `module` is the qualified module name ("" for the root), `attribute` an entry of its `__dict__`;
    `old` and `new` are an int, or an (arbitrarily nested) tuple of ints; lists become tuples.
    """

    module: str
    attribute: str
    old: Any
    new: Any

    def __post_init__(self) -> None:
        """Lists can't be hashed, and JSON knows nothing else: make them tuples. Refuse what are no sizes."""
        object.__setattr__(self, "old", _freeze(self.old))
        object.__setattr__(self, "new", _freeze(self.new))
        if type(self.module) is not str or type(self.attribute) is not str:
            raise PlanError(f"a size to change must be given by names, not {self.module!r} and {self.attribute!r}")
        if not shrinks(self.old, self.new):
            raise PlanError(f"{self.module}.{self.attribute}: {self.old!r} can't shrink to {self.new!r}")


class FrozenMapping(Mapping[str, Any]):
    """A read-only dictionary that can be copied and pickled.

    >>> FrozenMapping({"criterion": "l1"})
    {'criterion': 'l1'}
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True, slots=True)
class Plan:
    """An immutable description of one cut through the whole network.

    **Arguments:**

    - `cuts`: one for every group that the selection looked at, changed or not.
    - `attributes`: sizes in the model's own code that change with the cut (`prune` finds them).
    - `notes`: JSON-able remarks on how the plan came about: criterion, asked and achieved budget. Read-only, and no
      part of the hash.

    ```python
    >>> part = Slice("conv.weight", 0, (0, 1, 2), "filter")
    >>> plan = Plan((Cut("conv", (0, -1, 1), (part,), ()),))
    >>> print(plan)
    group  units  dropped  folded
    conv   3->2   1        0
    >>> Plan.from_json(plan.to_json()) == plan
    True

    ```
    """

    cuts: tuple[Cut, ...]
    attributes: tuple[AttributeChange, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Take a copy of the notes that nobody can change. Refuse a group that is cut twice."""
        names = [cut.group for cut in self.cuts]
        if len(set(names)) < len(names):
            raise PlanError(f"group {max(names, key=names.count)!r} is cut twice in one plan")
        object.__setattr__(self, "notes", FrozenMapping(self.notes))

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Group name → (units before, units after)."""
        return {cut.group: (cut.size, cut.new_size) for cut in self.cuts}

    @property
    def changes(self) -> bool:
        """Whether the plan does anything at all."""
        return any(cut.changes for cut in self.cuts) or bool(self.attributes)

    def __str__(self) -> str:
        """A plain-text table, one line a group."""
        rows = [("group", "units", "dropped", "folded")]
        for cut in self.cuts:
            dropped = cut.assignment.count(DROPPED)
            folded = cut.size - dropped - cut.new_size
            rows.append((cut.group, f"{cut.size}->{cut.new_size}", str(dropped), str(folded)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        document = {"format": FORMAT, "cuts": _plain(self.cuts), "attributes": _plain(self.attributes)}
        return json.dumps(document | {"notes": dict(self.notes), "checksum": _checksum(document)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; raises `PlanError` naming what is malformed."""
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise PlanError(f"plan format {document['format']!r} is not {FORMAT}: written by another version?")
            if document.get("checksum", known := _checksum(document)) != known:
                raise PlanError("the plan does not match its checksum: it is damaged, or was edited by hand")
            runs = Runs()
            return cls(
                cuts=tuple(_cut_from_dict(entry, runs) for entry in document["cuts"]),
                attributes=tuple(
                    AttributeChange(e["module"], e["attribute"], e["old"], e["new"]) for e in document["attributes"]
                ),
                notes=document["notes"],
            )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"not a plan: {one_line(error)}") from error


def keep_units(size: int, kept: Iterable[int]) -> tuple[int, ...]:
    """The assignment that keeps the units `kept` (in their old order) and drops the rest.

    >>> keep_units(4, [3, 1])
    (-1, 0, -1, 1)
    """
    assignment = [DROPPED] * size
    for index, unit in enumerate(sorted(set(kept))):
        if not 0 <= unit < size:
            raise PlanError(f"unit {unit} can't be kept: there are {size}")
        assignment[unit] = index
    return tuple(assignment)


def _checksum(document: Mapping[str, Any]) -> str:
    """CRC-32 of what a plan does, as JSON; plans of versions that wrote none are taken without it."""
    return f"{zlib.crc32(json.dumps([document['cuts'], document['attributes']]).encode()):08x}"


def _plain(value: Any) -> Any:
    """Cuts, slices and attribute changes as dictionaries; what is None is left out, and labels become runs."""
    if isinstance(value, Cut | Slice | AttributeChange):
        found = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return {
            name: encode(item) if name in ("assignment", "units") else _plain(item)
            for name, item in found.items()
            if item is not None
        }
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _cut_from_dict(entry: Mapping[str, Any], runs: Runs) -> Cut:
    return Cut(
        group=entry["group"],
        assignment=runs.decoded(entry["assignment"]),
        producers=tuple(_slice_from_dict(part, runs) for part in entry["producers"]),
        consumers=tuple(_slice_from_dict(part, runs) for part in entry["consumers"]),
        blend=tuple(entry["blend"]) if "blend" in entry else None,
        gain=tuple(entry["gain"]) if "gain" in entry else None,
    )


def _slice_from_dict(entry: Mapping[str, Any], runs: Runs) -> Slice:
    weight = tuple(entry["weight"]) if "weight" in entry else None
    return Slice(entry["tensor"], entry["axis"], runs.decoded(entry["units"]), entry["role"], weight)


def _check_integers(where: str, name: str, values: Iterable[Any]) -> None:
    """Refuse anything but whole numbers that NumPy can hold."""
    if not set(map(type, values)) <= {int} or not all(abs(value) < 1 << 62 for value in values):
        raise PlanError(f"{where}: {name} must be whole numbers")


def _check_factors(where: str, name: str, values: tuple[float, ...] | None) -> None:
    """Refuse NaN, infinity, and what is as good as infinite."""
    if values is not None and not (set(map(type, values)) <= {int, float} and all(abs(v) < _LARGEST for v in values)):
        raise PlanError(f"{where}: {name} must be finite numbers below {_LARGEST:g}")


def shrinks(old: Any, new: Any) -> bool:
    """Whether two sizes, nested alike, are whole numbers that become no larger.

    >>> shrinks((4, (2, -1)), (3, (2, -1))), shrinks(4, 5), shrinks(4, (4,)), shrinks(4, -1)
    (True, False, False, False)
    """
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return len(old) == len(new) and all(map(shrinks, old, new))
    return type(old) is int and type(new) is int and (0 <= new <= old or old <= new <= 0)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value
