"""Weights from anywhere: found in a checkpoint of a usual layout, known by their content, put into a network by name.

Nothing is executed: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, one_line, pass_on_exhaustion
from ..utils.arguments import typed
from ..utils.io import damage_told, read_safetensors
from ..utils.modules import classifier, named_tensors, unwrap
from .checkpoint import draw, is_pickle, read_header, rebuild

_NESTED = (
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "weights",
)
"""Keys under which trainers keep state dicts. Averaged weights first: they are what such a trainer evaluates."""


_PREFIXES = ("module.", "_orig_mod.", "model.", "_forward_module.")


_DEPTH = 4
"""Keys and prefixes that are gone through; a file that nests deeper, or holds itself, is none of a trainer's."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load_weights` took from a file, and what it did not.

    - `place`: keys that lead to it, such as `model_ema`; empty if it lay open.
    - `prefix`: what was taken off its names, such as `module.`.
    - `left_out`: names without that prefix.
    - `heads`: layer → its outputs in the file and in the model, for classifiers that were drawn anew.
    """

    place: str = ""
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """In words; empty if the file was the state dict and fitted.

        >>> print(Loaded("state_dict", "module.", heads={"fc": (1000, 10)}))
        taken from 'state_dict'; 'module.' taken off the names; fc is new: 10 outputs instead of 1000
        """
        parts = [f"taken from {self.place!r}"] if self.place else []
        parts += [f"{self.prefix!r} taken off the names"] if self.prefix else []
        parts += [f"left out: {_listed(self.left_out)}"] if self.left_out else []
        parts += [f"{name} is new: {here} outputs instead of {there}" for name, (there, here) in self.heads.items()]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name.

    - `source`: where they were found, for messages.
    - `place`: see `Loaded`.
    - `header`: that of a file that `save` wrote; else empty.
    """

    source: str
    tensors: Mapping[str, Tensor]
    place: str = ""
    header: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Weights:
        """The weights in a file: safetensors, or what `torch.save` wrote, opened with `weights_only=True`.

        **Raises:** `CheckpointError` for a file that is missing, damaged, or holds no state dict.
        """
        path = Path(path)
        if is_pickle(path):
            tensors, place = _from_pickle(path)
            return cls(str(path), tensors, place)
        header, tensors = read_safetensors(path)
        if "filterfold" not in header:
            return cls(str(path), tensors)
        aliases = read_header(path, header, "aliases")
        with damage_told(path, "damaged header"):
            tensors |= {name: tensors[first] for name, first in aliases.items() if first in tensors}
        return cls(str(path), tensors, header=header)

    @property
    def fingerprint(self) -> str:
        """The same for equal tensors under equal names, whatever file they lie in: 16 hexadecimal digits.

        >>> Weights("a", {"w": torch.ones(2)}).fingerprint == Weights("b", {"w": torch.zeros(2)}).fingerprint
        False
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def into(self, model: nn.Module, *, new_head: bool = False, classes: int | None = None) -> Loaded:
        """Put the weights into a model; one that `save` wrote has its sizes, too, so the model may become smaller.

        **Arguments:**

        - `new_head`: see `load_weights`.
        - `classes`: outputs that the model must keep, if they are known.

        **Raises:** `CheckpointError` naming what does not fit; the model is then as before.
        """
        model = unwrap(model)
        if not self.header:
            return self.by_name(model, new_head=new_head)
        head = None if classes is None else classifier(model, classes)
        there = None if head is None else self.tensors.get(f"{head}.weight")
        if head is None or classes is None or there is None or len(there) == classes:
            rebuild(model, Path(self.source), self.header, self.tensors)
            return Loaded()
        heads = {head: (len(there), classes)}
        if not new_head:
            raise CheckpointError(_wants_new_head(self.source, heads))
        rebuild(model, Path(self.source), self.header, self.tensors, head)
        return Loaded(heads=heads)

    def by_name(self, model: nn.Module, *, new_head: bool = False) -> Loaded:
        """Copy the weights into a bare model of the same names and shapes; see `load_weights`."""
        targets, expected = dict(named_tensors(model)), set(model.state_dict())
        found, prefix, left_out = _without_prefix(self.tensors, targets)
        if any(tensor.is_meta for tensor in targets.values()):
            raise CheckpointError("the model has no data (it is on the meta device): call its to_empty() first")
        heads, rows = _heads(found, targets)
        rest = {name: value for name, value in found.items() if name not in rows}
        if problems := _problems(rest, targets, expected - rows):
            hint = "; it is a pruned checkpoint: use load()" if self.header else ""
            problems = _problems(found, targets, expected) if rows else problems
            raise CheckpointError(f"{self.source} does not fit {type(model).__name__}: {'; '.join(problems)}{hint}")
        if heads and not new_head:
            raise CheckpointError(_wants_new_head(self.source, heads))
        with torch.no_grad():
            for name, value in rest.items():
                targets[name].copy_(value)
        for head in heads:
            draw(model.get_submodule(head))
        return Loaded(self.place, prefix, left_out, heads)


@typed
def load_weights(model: nn.Module, path: str | Path, *, new_head: bool = False) -> Loaded:
    """Fill a model from safetensors or a `torch.save`d state dict, matching names and shapes exactly.

    Pickled files are read with `weights_only=True`, so nothing in them is executed. Usual layouts are understood: a
    state dict under a key such as `state_dict`, `model` or `model_ema` (averaged weights are preferred), and prefixes
    such as `module.`, `_orig_mod.`, or Lightning's `model.`.

    **Arguments:**

    - `model`: bare, or in the wrappers that `apply` knows.
    - `new_head`: where everything fits but the classifier's number of classes, keep the model's and draw it anew, as
      PyTorch draws such layers by default. The classifier is the layer, or the layers, whose weights differ from the
      file's in the number of outputs only.

    **Returns:** what was taken, and what was not.

    **Raises:** `CheckpointError` naming the keys that are missing, unknown, or of another shape; the
    model is then as before.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
    >>> torch.save({"state_dict": {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}}, path)
    >>> net = nn.Linear(2, 1)
    >>> print(load_weights(net, path), net.weight.tolist())
    taken from 'state_dict'; 'module.' taken off the names [[1.0, 1.0]]
    """
    return Weights.read(path).by_name(unwrap(model), new_head=new_head)


def _from_pickle(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file of `torch.save`, and the keys that lead to it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        pass_on_exhaustion(error)
        raise CheckpointError(f"{path}: not a plain state dict ({one_line(error)})") from error
    keys: list[str] = []
    while isinstance(found, Mapping) and len(keys) < _DEPTH:
        inner = next((key for key in _NESTED if isinstance(found.get(key), Mapping) and found[key]), None)
        if inner is None:
            break
        keys.append(inner)
        found = found[inner]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: holds a {type(found).__name__} without tensors, not a state dict")
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()  # expanded, to any size
        ):
            raise CheckpointError(f"{path}: {name} is not an ordinary dense tensor with data")
    return tensors, ".".join(keys)


def _without_prefix(
    found: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """(tensors under the model's names, what was taken off them, the names that were left out for not having it)."""
    names, taken, left_out = dict(found), "", []
    for _ in range(_DEPTH):
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), None)
        if prefix is None or set(names) & set(targets):
            break
        left_out += [taken + name for name in names if not name.startswith(prefix)]
        names = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
        taken += prefix
    return names, taken, tuple(left_out)


def _heads(
    found: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Layers that differ in nothing but their number of outputs, the same for all, and the names of their tensors.

    Nothing if anything else differs: then it is no classifier of another size.
    """
    differing = [name for name in found if name in targets and found[name].shape != targets[name].shape]
    pairs = {(found[name].shape[:1], targets[name].shape[:1]) for name in differing}
    layers = {name.rpartition(".")[0] for name in differing}
    weighted = {name.rpartition(".")[0] for name in differing if found[name].ndim > 1}
    alike = all(found[name].shape[1:] == targets[name].shape[1:] for name in differing)
    if len(pairs) != 1 or weighted != layers or not alike:
        return {}, frozenset()
    [((there,), (here,))] = pairs
    return dict.fromkeys(sorted(layers), (there, here)), frozenset(differing)


def _wants_new_head(source: str, heads: Mapping[str, tuple[int, int]]) -> str:
    [(there, here)] = set(heads.values())
    return (
        f"{source} fits but for the classifier: {_listed(heads)} has {there} outputs there, {here} here; "
        "a new one takes its place with new_head=True (train and compare: --new-head)"
    )


def _problems(found: Mapping[str, Tensor], targets: Mapping[str, Tensor], expected: Set[str]) -> list[str]:
    shapes = [
        f"{name} has shape {tuple(found[name].shape)}, the model {tuple(targets[name].shape)}"
        for name in found
        if name in targets and found[name].shape != targets[name].shape
    ]
    kinds = [
        f"{name} is {found[name].dtype}, the model {targets[name].dtype}"
        for name in found
        if name in targets and targets[name].is_floating_point() and not found[name].is_floating_point()
    ]
    # A tied tensor is there under any of its names; files from before 2018 have no num_batches_tracked.
    there = {id(targets[name]) for name in found if name in targets}
    missing = [
        name
        for name in sorted(expected - set(found))
        if name in targets and id(targets[name]) not in there and not name.endswith("num_batches_tracked")
    ]
    unknown = sorted(set(found) - set(targets))
    problems = kinds[:2] + shapes[:2] + ([f"{len(shapes) - 2} more shapes differ"] if len(shapes) > 2 else [])
    problems += [f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    if missing and unknown:
        close = difflib.get_close_matches(unknown[0], missing, 1)
        problems += [f"is {unknown[0]} meant as {close[0]}?"] if close else []
    return problems


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
