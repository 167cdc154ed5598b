"""Running only the end of a network again: module calls that a change can't reach give their recorded outputs.

A recording of one forward pass numbers the module calls. If some module's parameters are changed
afterwards, every call that ended before that module was first entered has the same output as
recorded, so it is not run again. What stands between modules (an addition, a ReLU) is computed anew.
Nothing is assumed about how the modules are wired: they are called by the model's own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import ModelError
from ...utils.inputs import call
from ...utils.model_state import preserved

_MISSING = object()


PLAIN = (Tensor, int, float, bool, str, type(None))


@dataclass(slots=True)
class Call:
    """One module call: its place is `start`, and the calls inside it are start + 1 … end - 1.

    - `fragile`: whether somebody writes into its output later on, so that it must be copied.
    - `plain`: whether it can be left out: its output consists of tensors and plain values, and it does not write into
      its arguments (calls inside one that does may be left out all the same).
    - `bytes`: size of its output in the small pass.
    """

    module: int
    start: int
    end: int = -1
    fragile: bool = False
    plain: bool = True
    bytes: int = 0


class PartialForward:
    """Runs a model again from where a change can first matter.

    The model must make the same module calls in the same order whenever it runs, and read the
    parameters of a module only inside that module's call; what breaks the first is noticed, what
    breaks the second is found by comparing `run` with a full pass (`filterfold.bench.sensitivity` does).

    **Arguments:**

    - `model`: any module; runs in eval mode, without gradients, and is left as it was.
    - `example`: inputs for one small pass in which the calls are numbered.

    ```python
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    >>> inputs = torch.randn(3, 4)
    >>> forward = PartialForward(model, inputs)
    >>> place = forward.place(["2.weight"])
    >>> with forward.recorded(inputs, [place]) as run:
    ...     _ = model[2].weight.data.zero_()  # the first layer and the ReLU are not run again
    ...     torch.equal(run(place), model[2].bias.expand(3, 2))
    True

    ```
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self._modules = list(model.modules())
        self._index = {id(module): index for index, module in enumerate(self._modules)}
        self.calls: list[Call] = []
        self._learn(example)

    def place(self, tensors: Iterable[str]) -> int:
        """The first place where a change of these parameters or buffers can matter.

        That is where the module that holds one of them, or the nearest one around it that is called
        at all, is first called.
        """
        owners = {self._owner(name) for name in tensors}
        return min((this.start for this in self.calls if this.module in owners), default=0)

    def bytes(self, places: Iterable[int]) -> int:
        """How much `recorded` keeps for inputs of the example's size."""
        return sum(self.calls[number].bytes for number in {n for place in places for n in self._border(place)})

    @contextmanager
    def recorded(self, inputs: Any, places: Iterable[int]) -> Iterator[Callable[[int], Any]]:
        """Record a pass over some inputs; gives a function that runs the model again from one of the places.

        **Arguments:**

        - `inputs`: a tensor, tuple or mapping, as the model takes them.
        - `places`: the places that will be asked for: only outputs that these need are kept.

        **Raises:** `ModelError` if the model does not make the calls that it made before.
        """
        wanted = {number for place in set(places) for number in self._border(place)}
        state = _Pass()

        def keep(number: int, output: Any) -> None:
            if number in wanted:
                state.kept[number] = tree_map(_copied, output) if self.calls[number].fragile else output

        def again(place: int) -> Any:
            state.place, state.next = place, 0
            return call(self.model, inputs)

        with preserved(self.model), torch.no_grad(), self._wrapped(state):
            state.seen = keep
            call(self.model, inputs)
            state.seen = None
            yield again

    def _border(self, place: int) -> list[int]:
        """The outermost calls that end before a place: exactly those whose outputs a run from there reads."""
        found = []
        number = 0
        while number < min(place, len(self.calls)):
            this = self.calls[number]
            if this.end <= place and this.plain:
                found.append(number)
                number = this.end
            else:
                number += 1
        return found

    def _owner(self, tensor: str) -> int:
        called = {this.module for this in self.calls}
        name = tensor.rpartition(".")[0]
        while name:
            index = self._index[id(self.model.get_submodule(name))]
            if index in called:
                return index
            name = name.rpartition(".")[0]
        return 0

    def _learn(self, example: Any) -> None:
        """Number the calls, and see which outputs are written into after they were returned."""
        outputs: list[tuple[Call, Tensor, int]] = []

        def see(number: int, output: Any) -> None:
            this, leaves = self.calls[number], tree_leaves(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            this.plain = this.plain and all(isinstance(leaf, PLAIN) for leaf in leaves)
            this.bytes = sum(tensor.nbytes for tensor in tensors)
            outputs.extend((this, tensor, tensor._version) for tensor in tensors)

        state = _Pass(learning=True, seen=see)
        with preserved(self.model), torch.no_grad(), self._wrapped(state):
            call(self.model, example)
        for this, tensor, version in outputs:
            this.fragile = this.fragile or tensor._version != version

    @contextmanager
    def _wrapped(self, state: _Pass) -> Iterator[None]:
        """Put a counting forward in front of every module's own, for the length of a `with` block."""
        before = [vars(module).get("forward", _MISSING) for module in self._modules]
        try:
            for index, module in enumerate(self._modules):
                if not isinstance(module, torch.jit.ScriptModule):
                    vars(module)["forward"] = self._counted(index, module.forward, state)
            yield
        finally:
            for module, forward in zip(self._modules, before, strict=True):
                if forward is _MISSING:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward

    def _counted(self, index: int, forward: Callable[..., Any], state: _Pass) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            number = state.next
            if state.learning:
                self.calls.append(Call(index, number))
            elif number >= len(self.calls) or self.calls[number].module != index:
                raise ModelError("the model calls its modules in another order than before; it can't be run in part")
            this = self.calls[number]
            if state.seen is None and number in state.kept and this.end <= state.place:
                state.next = this.end
                return tree_map(_copied, state.kept[number]) if this.fragile else state.kept[number]
            state.next = number + 1
            versions = _versions((arguments, keywords)) if state.learning else []
            output = forward(*arguments, **keywords)
            if state.learning:
                this.end, this.plain = state.next, versions == _versions((arguments, keywords))
            elif this.end != state.next:
                raise ModelError("the model calls other modules than before; it can't be run in part")
            if state.seen is not None:
                state.seen(number, output)
            return output

        return run


@dataclass(slots=True)
class _Pass:
    """Where a pass stands; `seen` looks at the outputs while recording, None while running again."""

    learning: bool = False
    seen: Callable[[int, Any], None] | None = None
    next: int = 0
    place: int = 0
    kept: dict[int, Any] = field(default_factory=dict)


def _versions(values: Any) -> list[int]:
    """How often each tensor was written into."""
    return [leaf._version for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
