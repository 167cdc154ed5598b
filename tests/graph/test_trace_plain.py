"""Groups of plain and residual networks, written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filterfold.errors import TraceError
from filterfold.graph import Traced, trace


def slices(groups: Traced, name: str) -> tuple[set[tuple[str, int, str]], set[tuple[str, int, str]]]:
    group = groups.by_name[name]
    return (
        {(part.tensor, part.axis, part.role) for part in group.producers},
        {(part.tensor, part.axis, part.role) for part in group.consumers},
    )


def norm(name: str) -> set[tuple[str, int, str]]:
    return {(f"{name}.{entry}", 0, "norm") for entry in ("weight", "bias", "running_mean", "running_var")}


def test_plain_network_has_one_group_for_each_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 2)
    )  # fmt: skip
    groups = trace(net, torch.randn(2, 3, 16, 16))
    assert [(group.name, group.size, group.exact) for group in groups] == [
        ("0", 8, True), ("4", 6, True), ("9", 5, True), ("11", 2, True)
    ]  # fmt: skip
    assert [group.frozen for group in groups] == [None, None, None, "reaches the model's output"]
    assert slices(groups, "0") == (
        {("0.weight", 0, "filter"), ("0.bias", 0, "bias"), *norm("1")},
        {("4.weight", 1, "kernel")},
    )
    assert slices(groups, "4") == ({("4.weight", 0, "filter"), ("4.bias", 0, "bias")}, {("9.weight", 1, "kernel")})
    (columns,) = groups.by_name["4"].consumers
    assert columns.units == tuple(channel for channel in range(6) for _ in range(4))
    assert set(groups[0].classes) == {0}
    assert set(groups[0].blocks) == {0}


class Residual(nn.Module):
    """He's block; a change of width is bridged by padding with zero channels, or by a projection."""

    def __init__(self, width_in: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width_in, width, 1, stride) if project and stride > 1 else None
        self.stride, self.extra = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.down is not None:
            x = self.down(x)
        elif self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        y += x
        return F.relu(y)


def residual_network(project: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), Residual(4, 4, 1, project), Residual(4, 8, 2, project), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip


def test_zero_padded_shortcuts_leave_only_first_convolutions_free() -> None:
    groups = trace(residual_network(project=False), torch.randn(1, 3, 8, 8))
    assert [group.name for group in groups if group.frozen is None] == ["1.conv1", "2.conv1"]
    assert "constant padding" in str(groups.by_name["0"].frozen)
    assert slices(groups, "2.conv1") == (
        {("2.conv1.weight", 0, "filter"), *norm("2.bn1")},
        {("2.conv2.weight", 1, "kernel")},
    )


def test_projection_shortcuts_couple_each_stage() -> None:
    groups = trace(residual_network(project=True), torch.randn(1, 3, 8, 8))
    assert [(group.name, group.size) for group in groups if group.frozen is None] == [
        ("0", 4), ("1.conv1", 4), ("2.conv1", 8), ("2.conv2", 8)
    ]  # fmt: skip
    producers, consumers = slices(groups, "2.conv2")
    assert producers == {
        ("2.conv2.weight", 0, "filter"), ("2.down.weight", 0, "filter"), ("2.down.bias", 0, "bias"), *norm("2.bn2")
    }  # fmt: skip
    assert consumers == {("5.weight", 1, "kernel")}


def test_tracing_leaves_the_model_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = residual_network(project=True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = x
            return self.body(x + torch.rand(()))

    net = Counting()
    net.body[1].eval()
    list(net.parameters())[2].requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    about = [(dict(vars(module)), module.training) for module in net.modules()]
    needs = [parameter.requires_grad for parameter in net.parameters()]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        trace(net, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [(dict(vars(module)), module.training) for module in net.modules()] == about
    assert [parameter.requires_grad for parameter in net.parameters()] == needs
    assert all(bool((parameter.grad == 1).all()) for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_model_that_does_not_run_is_refused_in_one_line() -> None:
    with pytest.raises(TraceError, match="does not run on the example inputs") as caught:
        trace(nn.Conv2d(3, 4, 3), torch.zeros(1, 5, 8, 8))
    assert "\n" not in str(caught.value)


def test_dictionary_inputs_and_structured_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, *, image: Tensor, depth: Tensor) -> dict[str, list[Tensor]]:
            y = self.a(image) * self.b(depth)
            return {"scores": [self.c(y)]}

    groups = trace(Two(), {"image": torch.randn(1, 3, 4, 4), "depth": torch.randn(1, 1, 4, 4)})
    assert [(group.name, group.frozen is None) for group in groups] == [("a", True), ("c", False)]
    assert slices(groups, "a")[0] == {
        (f"{name}.{kind}", 0, role) for name in "ab" for kind, role in (("weight", "filter"), ("bias", "bias"))
    }
