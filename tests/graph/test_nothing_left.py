"""What a pass of ours leaves behind: nothing, in the model, its classes, or the caller's inputs."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold.errors import FilterfoldError
from filterfold.profiling.macs import measure

from .networks import call, randomise


class Base(nn.Module):
    """Three convolutions; subclasses do something to themselves on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self.a(x).relu())).relu())


class Hooks(Base):
    """Installs hooks at the first call, and notes in a flag that it did; installed twice they count twice."""

    def between(self, x: Tensor) -> Tensor:
        if not getattr(self, "_installed", False):
            self.b.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
            self.c.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
            self._installed = True
        return x


class Children(Base):
    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Identity()
            self.register_buffer("table", torch.ones(1), persistent=False)
        return self.late(x) * self.table


class Caches(Base):
    """In nested dictionaries, a plain object and the class; all are asked before anything is computed."""

    shared: ClassVar[dict[Any, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, dict[str, Tensor]] = {"inner": {}}
        self.config = SimpleNamespace(calls=0, found=None)

    def between(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        self.config.calls += 1
        if self.config.found is None:
            self.config.found = torch.ones(1)
        self.kept["inner"].setdefault("w", torch.full((1,), 2.0))
        self.shared.setdefault(size, torch.arange(size).to(x))
        return x * self.kept["inner"]["w"] + self.shared[size] + ramp(size) * self.config.found


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size)


class Counter(Base):
    """Counts its calls in a buffer, and computes with the number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def between(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.steps


class Literals(Base):
    """Constants made in forward, some of them written to."""

    def between(self, x: Tensor) -> Tensor:
        pair, one = torch.tensor([0.5, 1.5]), x.new_tensor([0.25])
        pair[0] = 2
        pair.mul_(3)
        one += 1
        return x * torch.tensor(0.5) * pair.sum() + one


class Breaks(Hooks):
    def forward(self, x: Tensor) -> Tensor:
        self.half_done = True
        super().forward(x)
        raise RuntimeError("no more")


NETWORKS = (Hooks, Children, Caches, Counter, Literals)


def state(model: nn.Module) -> list[Any]:
    """Attributes, the content of all containers, and values."""
    found: list[Any] = [{name: value.clone() for name, value in model.state_dict().items()}]
    for module in model.modules():
        found.append({name: id(value) for name, value in vars(module).items()})
        found.append({name: list(value) for name, value in vars(module).items() if isinstance(value, dict)})
        found.append(module.training)
    return found


def assert_same(before: list[Any], after: list[Any]) -> None:
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name])
    assert before[1:] == after[1:]


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_trace_leaves_the_model_as_it_was(kind: type[Base]) -> None:
    ramp.cache_clear()
    Caches.shared.clear()
    model = randomise(kind()).float().train()
    untouched = copy.deepcopy(model)
    before = state(model)
    groups = ff.trace(model, image())
    measure(model, image())
    assert [group.frozen for group in groups] == [None, None, "reaches the model's output"]
    assert_same(before, state(model))
    assert vars(getattr(model, "config", SimpleNamespace(calls=0, found=None))) == {"calls": 0, "found": None}
    assert getattr(model, "kept", {"inner": {}}) == {"inner": {}}
    assert not Caches.shared
    assert ramp.cache_info().currsize == 0
    torch.testing.assert_close(model(image()), untouched(image()))
    model(image()).sum().backward()  # nothing from inference mode is left


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_cut_network_computes_what_a_human_cut_computes(kind: type[Base]) -> None:
    """Dead halves of both layers; whatever the model installs, it installs once."""
    model = randomise(kind())
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[::2] = 0
            layer.bias[::2] = 0
        model.b.weight[:, ::2] = 0  # so that nothing that is added to dead channels on the way is read
        model.c.weight[:, ::2] = 0
    expected = call(copy.deepcopy(model), image().double())
    result = ff.prune(model, image().double(), keep=0.5, strict=True)
    assert result.plan.widths == {"a": (8, 4), "b": (6, 3)}
    torch.testing.assert_close(call(model, image().double()), expected)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = Breaks().train()
    before = state(model)
    for verb in (ff.trace, lambda *args: ff.prune(*args, keep=0.5)):
        with pytest.raises(FilterfoldError, match="run on the example inputs: RuntimeError: no more"):
            verb(model, image())
    assert_same(before, state(model))


class Consuming(Base):
    """Takes its inputs out of their containers, and writes into them."""

    def forward(self, batch: dict[str, Any], others: list[Tensor], holder: Any = None) -> Tensor:
        x = batch.pop("image")
        batch["seen"] = True
        x -= others.pop().mean()
        if holder is not None:
            x += holder.offset
            holder.offset.zero_()
        return super().forward(x)


def test_example_inputs_stay_the_callers() -> None:
    model = randomise(Consuming())
    images, others = image().double(), [image().double()]
    inputs = {
        "batch": {"image": images, "name": "x"},
        "others": others,
        "holder": SimpleNamespace(offset=image().double()),
    }
    fresh = copy.deepcopy(inputs)
    result = ff.prune(model, inputs, keep=0.5, strict=True)
    assert result.plan.widths == {"a": (8, 4), "b": (6, 3)}
    assert list(inputs["batch"]) == ["image", "name"]
    assert inputs["batch"]["image"] is images
    assert len(others) == 1
    torch.testing.assert_close(
        [images, *others, inputs["holder"].offset],
        [fresh["batch"]["image"], *fresh["others"], fresh["holder"].offset],
    )


class Frames(Base):
    """Clips of four frames, folded into the batch axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 4, 2, *x.shape[2:]).mean(1)


def test_where_one_example_cannot_be_run_all_are_and_the_cost_is_their_mean() -> None:
    model, frames = randomise(Frames()), torch.randn(8, 3, 6, 6, dtype=torch.float64)
    result = ff.prune(model, frames, keep=0.5, strict=True)
    assert result.before.macs == 36 * (3 * 8 * 9 + 8 * 6 + 6 * 2)
    assert result.after.macs == 36 * (3 * 4 * 9 + 4 * 3 + 3 * 2)
