"""Clusters → a plan that folds units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import SelectionError
from ..groups import ChannelGroup
from ..plan import DROPPED, Cut, Plan
from .checks import suggestion


def from_clusters(groups: Iterable[ChannelGroup], labels: Mapping[str, Sequence[int]]) -> Plan:
    """Turn cluster labels into a plan that folds every cluster into one unit.

    **Arguments:**

    - `groups`: what `filterfold.trace` found.
    - `labels`: group name → for every unit the label of its cluster (any ints), or -1 to drop it.
      Groups without labels are not part of the plan.

    **Returns:** a `Plan`; new units are in the order of their clusters' first members.

    **Raises:** `SelectionError` if a cluster spans two classes or two blocks, if blocks keep
    different numbers of units, if a class is left without a unit, or if the group is frozen.

    ```python
    >>> from filterfold.groups import ChannelGroup
    >>> group = ChannelGroup("conv", 4, (), (), True, None, (0,) * 4, (0,) * 4)
    >>> from_clusters([group], {"conv": [7, 2, 7, 5]}).cuts[0].assignment
    (0, 1, 0, 2)

    ```
    """
    groups = tuple(groups)
    named = {group.name: group for group in groups}
    cuts = []
    for name, values in labels.items():
        if name not in named:
            raise SelectionError(f"labels: no group is named {name!r}{suggestion(name, named)}")
        group = named[name]
        if group.frozen is not None:
            raise SelectionError(f"group {name!r} can't be folded: {group.frozen}")
        if len(values) != group.size:
            raise SelectionError(f"group {name!r}: {len(values)} labels for {group.size} units")
        members: dict[int, list[int]] = {}
        for unit, label in enumerate(values):
            if int(label) != DROPPED:
                members.setdefault(int(label), []).append(unit)
        _check_clusters(group, members)
        index = {label: new for new, label in enumerate(members)}
        assignment = tuple(index.get(int(label), DROPPED) for label in values)
        cuts.append(Cut(name, assignment, group.producers, group.consumers))
    return Plan(tuple(cuts))


def _check_clusters(group: ChannelGroup, members: Mapping[int, Sequence[int]]) -> None:
    where = f"group {group.name!r}"
    if not members:
        raise SelectionError(f"{where}: every unit is dropped; keep at least one")
    for label, units in members.items():
        for what, marks in (("class", group.classes), ("block", group.blocks)):
            if len({marks[unit] for unit in units}) > 1:
                raise SelectionError(
                    f"{where}: cluster {label} spans more than one {what}; cluster each {what} by itself"
                )
    classes = {group.classes[units[0]] for units in members.values()}
    if classes != set(group.classes):
        raise SelectionError(f"{where}: class {min(set(group.classes) - classes)} is left without a unit")
    kept = dict.fromkeys(group.blocks, 0)
    for units in members.values():
        kept[group.blocks[units[0]]] += 1
    if len(set(kept.values())) > 1:
        raise SelectionError(f"{where}: blocks keep {min(kept.values())} to {max(kept.values())} units; must be equal")
