"""From labels to groups: connected labels are units, units that share a layer's filters are a group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan import ChannelGroup, Role, Slice
from .labels import OUTPUT, AxisLabels, LabelTable

Ints = NDArray[np.int64]


NOWHERE = -1


# What a layer's weight is called: plain, under torch.nn.utils' old hooks, and under a parametrization.
_WEIGHT = re.compile(r"(^|\.)(weight(_v|_orig)?|parametrizations\.weight\.original\d?)$")


@dataclass(frozen=True, slots=True)
class Assembly:
    """The groups, and for every label the group and the unit that it belongs to (-1: none).

    `constant`: which labels stand for positions that no parameter makes.
    """

    groups: tuple[ChannelGroup, ...]
    group_of: Ints
    unit_of: Ints
    constant: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Members:
    """Components gathered into groups.

    `group_of`, `unit_of`: per label; `axes`: what each group touches; `makers`: the first filter of each.
    """

    group_of: Ints
    unit_of: Ints
    axes: list[list[AxisLabels]]
    sizes: list[int]
    makers: list[AxisLabels]


def assemble(table: LabelTable) -> Assembly:
    """All groups, in the order in which the model registers their first layers."""
    blocks = list(table.blocks)
    # Blocks that must keep equally many units (the groups of a group norm) are a constraint on a group's units. Where
    # they can't be written as one partition of them, the blocks' labels are joined instead, and all begins again.
    extra: list[tuple[Ints, Ints]] = []
    while True:
        component, count = _connect([*table.joins, *extra], table.size)
        members = _gather(table, component, count, _filters(table, component, count))
        parts, conflicts = _balance(members, blocks)
        if not conflicts:
            break
        extra += [(rows[:1], rows) for rows in conflicts]
        blocks = [rows for rows in blocks if not any(rows is conflict for conflict in conflicts)]
    frozen = _reasons(table.frozen, members)
    inexact = _reasons(table.inexact, members)
    summed = {group: why for group, why in _reasons(table.summed, members).items() if group not in inexact}
    alive = {group for vector in table.alive if summed for group in np.unique(members.group_of[vector]).tolist()}
    ordered = {group for vector in table.ordered for group in np.unique(members.group_of[vector]).tolist()}
    names = _names(members.makers)
    for group, size in enumerate(members.sizes):
        if size == 1 and frozen.get(group) != OUTPUT:
            frozen.pop(group, None)  # the last unit of a class always stays
    groups = []
    for group, size in enumerate(members.sizes):
        producers, consumers, classes = _slices(table, members, group)
        groups.append(
            ChannelGroup(
                name=names[group],
                size=size,
                producers=producers,
                consumers=consumers,
                exact=group not in inexact and group not in summed,
                frozen=frozen.get(group),
                classes=classes,
                blocks=tuple(parts[group].tolist()),
                symmetric=group not in ordered,
                remark=inexact.get(group, summed.get(group)),
                zeros_vanish=group in summed and group not in alive,
            )
        )
    constant = table.is_constant(np.arange(table.size))
    return Assembly(tuple(groups), members.group_of, members.unit_of, constant)


def _connect(joins: list[tuple[Ints, Ints]], size: int) -> tuple[Ints, int]:
    """Connected components: one number for each of `size` labels, and how many there are."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [(a, b) if a.shape == b.shape else np.broadcast_arrays(a, b) for a, b in joins]
    first = np.concatenate([np.zeros(0, np.int64), *(a.ravel() for a, _ in pairs)])
    second = np.concatenate([np.zeros(0, np.int64), *(b.ravel() for _, b in pairs)])
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(size, size))
    count, component = connected_components(graph, directed=False)
    return component.astype(np.int64), int(count)


def _filters(table: LabelTable, component: Ints, count: int) -> list[AxisLabels]:
    """The axes that make channels. A raw parameter's axis that can't shrink stands for something else."""
    frozen = np.zeros(count, dtype=bool)
    for vector, _ in table.frozen if table.maybe else ():
        frozen[component[vector]] = True
    return [
        entry
        for entry in table.axes
        if table.roles.get(entry.start) == "filter"
        and not (entry.start in table.maybe and frozen[component[_span(entry)]].any())
    ]


def _gather(table: LabelTable, component: Ints, count: int, filters: list[AxisLabels]) -> _Members:
    """Components that share a filter axis make a group; units are numbered in filter order."""
    # A graph again: its nodes are the components and, after them, the filter axes; an axis is joined with the
    # components of its positions.
    joins = [(np.array([count + place]), component[_span(entry)]) for place, entry in enumerate(filters)]
    bucket, buckets = _connect(joins, count + len(filters))
    numbers = np.full(buckets, NOWHERE, np.int64)
    unit = np.full(count, NOWHERE, np.int64)
    sizes: list[int] = []
    makers: list[AxisLabels] = []
    for place, entry in enumerate(filters):
        group = numbers[bucket[count + place]]
        if group == NOWHERE:
            group = numbers[bucket[count + place]] = len(sizes)
            sizes.append(0)
            makers.append(entry)
        parts = component[_span(entry)]
        fresh = parts[np.sort(np.unique(parts, return_index=True)[1])]
        fresh = fresh[unit[fresh] == NOWHERE]
        unit[fresh] = np.arange(sizes[group], sizes[group] + len(fresh))
        sizes[group] += len(fresh)
    group_of = np.where(unit[component] == NOWHERE, NOWHERE, numbers[bucket[:count]][component])
    axes: list[list[AxisLabels]] = [[] for _ in sizes]
    for entry in table.axes:
        touched = group_of[_span(entry)]
        if not touched.size or (first := touched[0]) == (last := touched[-1]) == NOWHERE == touched.max():
            continue
        whole = first == last and (touched == first).all()
        for group in [int(first)] if whole else np.unique(touched[touched != NOWHERE]).tolist():
            axes[group].append(entry)
    return _Members(group_of, unit[component], axes, sizes, makers)


def _names(makers: list[AxisLabels]) -> list[str]:
    """A group is named after the layer whose weight it is, or after a raw parameter itself; no name comes twice.

    >>> _names([AxisLabels("a.weight", 0, 0, 4), AxisLabels("w", 0, 4, 2), AxisLabels("w", 1, 6, 3)])
    ['a', 'w:0', 'w:1']
    """
    full = [entry.tensor for entry in makers]
    short = [_WEIGHT.sub("", tensor) or tensor for tensor in full]
    along = [f"{entry.tensor}:{entry.axis}" for entry in makers]
    return [
        next(name for name, all_ in ((a, short), (b, full), (c, along)) if all_.count(name) == 1)
        for a, b, c in zip(short, full, along, strict=True)
    ]


def _span(entry: AxisLabels) -> slice:
    return slice(entry.start, entry.start + entry.size)


def _reasons(entries: list[tuple[Any, str]], members: _Members) -> dict[int, str]:
    """For every group the first reason given for any of its labels."""
    found: dict[int, str] = {}
    for vector, reason in entries:
        for group in np.unique(members.group_of[vector]).tolist():
            found.setdefault(group, reason)
    return found


def _balance(members: _Members, blocks: list[Ints]) -> tuple[list[Ints], list[Ints]]:
    """Turn equal-count constraints into one partition of each group's units; return those that don't fit."""
    parts = [np.zeros(size, np.int64) for size in members.sizes]
    conflicts: list[Ints] = []
    for rows in blocks:
        groups, units = members.group_of[rows], members.unit_of[rows]
        group = int(groups.flat[0])
        # Blocks of the very same units always keep equally many. Units are numbered within their groups, so two blocks
        # of different groups may hold the same numbers: the group counts too.
        which = np.sort(groups * (max(members.sizes, default=0) + 1) + units, axis=1)
        if (groups == NOWHERE).all() or (which == which[0]).all():
            continue
        once = (groups == group).all() and len(np.unique(units)) == units.size == members.sizes[group]
        finer = None
        if once:  # the rows hold every unit of one group once
            wanted = np.empty(units.size, np.int64)
            wanted[units] = np.arange(len(rows))[:, None]
            finer = _finer(parts[group], wanted)
        if finer is None:
            conflicts.append(rows)
        else:
            parts[group] = finer
    return parts, conflicts


def _finer(first: Ints, second: Ints) -> Ints | None:
    """The finer of two partitions into equal blocks; None if neither refines the other."""
    pairs = len(np.unique(np.stack([first, second], 1), axis=0))
    if pairs == len(np.unique(first)):
        return first
    return second if pairs == len(np.unique(second)) else None


def _kinds(counts: list[Ints]) -> Ints:
    """Number the columns of `counts` so that equal columns get equal numbers."""
    kinds = np.zeros_like(counts[0])
    for row in counts:
        if row.min() != row.max():
            kinds = np.unique(kinds * (int(row.max()) + 1) + row, return_inverse=True)[1].reshape(-1)
    return kinds


def _slices(
    table: LabelTable, members: _Members, group: int
) -> tuple[tuple[Slice, ...], tuple[Slice, ...], tuple[int, ...]]:
    """The slices that make a group's units, those that read them, and the class of each unit."""
    size = members.sizes[group]
    producers: list[Slice] = []
    consumers: list[Slice] = []
    counts: list[Ints] = []
    vectors: dict[bytes, tuple[int, ...]] = {}  # most slices of a group have the same
    for entry in members.axes[group]:
        here = members.group_of[_span(entry)] == group
        units = np.where(here, members.unit_of[_span(entry)], NOWHERE)
        role: Role = table.roles.get(entry.start, "scale")
        key = units.tobytes()
        if key not in vectors:
            vectors[key] = tuple(units.tolist())
            counts.append(np.bincount(units[here], minlength=size))
        (consumers if role == "kernel" else producers).append(Slice(entry.tensor, entry.axis, vectors[key], role))
    for piece in table.pieces:
        mine = members.unit_of[piece][members.group_of[piece] == group]
        if mine.size:
            counts.append(np.bincount(mine, minlength=size))
    return tuple(producers), tuple(consumers), tuple(_kinds(counts).tolist())
