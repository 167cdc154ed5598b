"""Running the end of a network again gives what the whole network gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from filterfold.bench.sensitivity.partial_forward import PartialForward
from filterfold.errors import ModelError
from filterfold.zoo import build


class InPlace(nn.Module):
    """A residual sum and a ReLU that write into what other modules returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.norm(self.first(images))
        features = self.second(self.relu(stem))
        features += stem
        return self.third(self.relu(features)).mean((2, 3))


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.layer(values))))


class Pair(nn.Module):
    """A module that returns a tuple, and one whose parameter is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = Halves()
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, values: Tensor) -> Tensor:
        left, right = self.halves(values)
        return left * self.scale + right


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        return self.layer(values).chunk(2, 1)


CASES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("resnet20", lambda: build("resnet20", width=0.5), (2, 3, 16, 16)),
    ("vgg_small", lambda: build("vgg_small", channels=1, image_size=8), (2, 1, 8, 8)),
    ("in place", InPlace, (2, 4, 6, 6)),
    ("shared", Shared, (3, 5)),
    ("pair", Pair, (3, 4)),
]


@pytest.mark.parametrize(("name", "factory", "shape"), CASES, ids=[case[0] for case in CASES])
def test_any_change_gives_what_a_full_pass_gives(
    name: str, factory: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = factory().eval()
    inputs = torch.randn(shape)
    forward = PartialForward(model, inputs[:1])
    names = [key for key, _ in model.named_parameters()]
    places = {key: forward.place([key]) for key in names}
    wholes = {}
    for key, parameter in model.named_parameters():
        with torch.no_grad(), halved(parameter):
            wholes[key] = model(inputs)
    with forward.recorded(inputs, places.values()) as run:
        for key, parameter in [*model.named_parameters()] * 2:  # twice: nothing that was kept is written into
            with halved(parameter):
                assert torch.equal(run(places[key]), wholes[key]), key


@contextmanager
def halved(parameter: nn.Parameter) -> Iterator[None]:
    before = parameter.detach().clone()
    parameter.data.mul_(0.5)
    yield
    parameter.data.copy_(before)


def test_only_the_end_runs_again() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))).eval()
    calls: list[int] = []
    for index, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    weights = [0] * 5

    def counting(index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(values: Tensor) -> Tensor:
            weights[index] += 1
            return forward(values)

        return run

    for index, layer in enumerate(model):
        layer.forward = counting(index, layer.forward)  # type: ignore[method-assign]
    forward = PartialForward(model, torch.zeros(1, 3))
    with forward.recorded(torch.zeros(2, 3), [forward.place(["3.weight"])]) as run:
        weights[:] = [0] * 5
        run(forward.place(["3.weight"]))
    assert weights == [0, 0, 0, 1, 1]


def test_modules_are_left_as_they_were() -> None:
    model = InPlace().train()
    before = [dict(vars(module)) for module in model.modules()]
    forward = PartialForward(model, torch.zeros(1, 4, 6, 6))
    with forward.recorded(torch.zeros(1, 4, 6, 6), [0]):
        assert not model.norm.training
    after = [dict(vars(module)) for module in model.modules()]
    assert [list(entry) for entry in after] == [list(entry) for entry in before]
    assert model.training
    assert model.norm.training


def test_a_model_that_changes_its_mind_is_refused() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.calm = nn.Linear(2, 2), nn.Linear(2, 2), True

        def forward(self, values: Tensor) -> Tensor:
            return self.one(values) if self.calm else self.other(values)

    model = Moody()
    forward = PartialForward(model, torch.zeros(1, 2))
    model.calm = False
    with pytest.raises(ModelError, match="in another order than before"), forward.recorded(torch.zeros(1, 2), [0]):
        pass
    assert "forward" not in vars(model.one)


def test_an_unknown_tensor_has_no_owner() -> None:
    forward = PartialForward(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(AttributeError):
        forward.place(["7.weight"])
