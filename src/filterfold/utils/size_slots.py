"""Where a module keeps sizes: in attributes, in an object that it holds (a configuration), in the constants of a graph.

A slot is named by a path: `width`, `config.hidden_sizes`, or `graph.view_1` for all integers among the arguments of a
node of an `fx.GraphModule`, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from .modules import like

GRAPH = "graph"


def plain_sizes(value: Any) -> Any:
    """An int, or nested tuple or list of ints, as tuples; None for anything else.

    >>> plain_sizes([1, (2, 3)]), plain_sizes(True), plain_sizes([1, "a"]), plain_sizes(())
    ((1, (2, 3)), None, None, None)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if type(value) is tuple and value and set(map(type, value)) == {int}:
        return value
    if isinstance(value, tuple | list) and value:
        items = tuple(plain_sizes(item) for item in value)
        return None if any(item is None for item in items) else items
    return None


def size_slots(module: nn.Module, seen: set[int] | None = None) -> dict[str, Any]:
    """Every slot of a module, with the int or nested tuple or list of ints that it holds.

    `seen`: objects that are left out, since another module holds them too; those met now are added.

    >>> module = nn.Identity(); module.width = 8; module.config = {"sizes": [8, 16], "name": "small"}
    >>> size_slots(module)["config.sizes"]
    [8, 16]
    """
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if type(value) in _SKIPPED:
            continue
        if plain_sizes(value) is not None:
            found[name] = value
        elif not name.startswith("_") and (entries := _entries(value)) is not None:
            if seen is not None:
                if id(value) in seen:
                    continue
                seen.add(id(value))
            for key, entry in entries.items():
                if isinstance(key, str) and not key.startswith("_") and plain_sizes(entry) is not None:
                    found[f"{name}.{key}"] = entry
    if isinstance(module, fx.GraphModule):
        found |= {f"{GRAPH}.{node.name}": sizes for node in module.graph.nodes if (sizes := _integers(node))}
    return found


def get_slot(module: nn.Module, path: str) -> Any:
    """What a slot holds; None if there is no such slot."""
    name, _, key = path.partition(".")
    if name == GRAPH and isinstance(module, fx.GraphModule):
        node = _node(module, key)
        return _integers(node) if node is not None else None
    value = vars(module).get(name)
    return value if not key else (_entries(value) or {}).get(key)


def set_slot(module: nn.Module, path: str, value: Any) -> None:
    """Give a slot another value."""
    name, _, key = path.partition(".")
    if name == GRAPH and isinstance(module, fx.GraphModule):
        node = _node(module, key)
        assert node is not None
        given = iter(value)
        node.args, node.kwargs = _mapped((node.args, node.kwargs), lambda _: next(given))
        module.recompile()
        return
    holder = vars(module)
    if key:
        entries = _entries(holder[name])
        assert entries is not None
        holder, name = entries, key
    holder[name] = value


_SKIPPED = frozenset({type(None), bool, float, str, Tensor, nn.Parameter, type(lambda: None)})


def _entries(value: Any) -> dict[str, Any] | None:
    """The entries of a plain dictionary or object, to be written to; None for anything else."""
    if type(value) is dict:
        return value
    if isinstance(value, Tensor | nn.Module | type) or callable(value) or type(value).__module__.startswith("torch."):
        return None
    return getattr(value, "__dict__", None)


def _node(module: fx.GraphModule, name: str) -> fx.Node | None:
    return next((node for node in module.graph.nodes if node.name == name), None)


def _integers(node: fx.Node) -> tuple[int, ...]:
    """All integers among a node's arguments."""
    found: list[int] = []

    def keep(item: int) -> int:
        found.append(item)
        return item

    _mapped((node.args, node.kwargs), keep)
    return tuple(found)


def _mapped(value: Any, turn: Callable[[int], int]) -> Any:
    """Nested arguments with every integer replaced."""
    if type(value) is int:
        return turn(value)
    if isinstance(value, tuple | list):
        items = [_mapped(item, turn) for item in value]
        return like(value, items) if isinstance(value, tuple) else items
    return {key: _mapped(item, turn) for key, item in value.items()} if isinstance(value, dict) else value


def graph_calls(module: nn.Module, op: str) -> Iterator[str]:
    """The slots of a graph's nodes that call an operation of this name, in the order in which they run."""
    for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if target.partition(".")[0].removesuffix("_") == op.removesuffix("_"):
            yield f"{GRAPH}.{node.name}"
