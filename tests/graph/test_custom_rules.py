"""Rules of the user's own: channels are followed and cut through custom operations, and mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold.errors import ConfigError, TraceError
from filterfold.graph import FIXED
from filterfold.graph.rules import RULES

from .networks import check, free


@torch.library.custom_op("filterfold_tests::scale", mutates_args=())
def scale(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors[:, None, None]


@pytest.fixture(autouse=True)
def same_rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.factors = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(scale(self.first(x), self.factors).relu())


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def follow(tracer, call):
    layout, entries = tracer.layout(call["x"]), tracer.layout(call["factors"])[0]
    tracer.table.assign(entries, "norm")
    tracer.table.join_axes([layout[1], entries], call.site)
    return layout


def test_without_a_rule_the_channels_are_frozen_by_name():
    (group, _) = ff.trace(Net(), X.float())
    assert group.frozen == "no rule for filterfold_tests::scale (filterfold_tests::scale)"


def test_with_a_rule_the_channels_are_cut_and_the_network_equals_the_masked_one():
    assert ff.tracing_rule("filterfold_tests::scale")(follow) is follow
    groups = check(Net().double(), X)
    assert free(groups) == {"first": 8}
    assert ("factors", 0, "norm") in [(part.tensor, part.axis, part.role) for part in groups[0].producers]
    net = Net()
    assert ff.prune(net, X.float(), keep=0.5).verified
    assert net.factors.shape == (4,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"needs the names of operations"),
        ((follow,), r"needs the names of operations"),
        (("filterfold_tests::scale.default",), r"names an overload; one rule serves all: 'filterfold_tests::scale'"),
        (("filterfold_tests::scael",), r"PyTorch knows no operation 'filterfold_tests::scael'"),
        (("conv2d",), r"'conv2d' has a rule already"),
        (("aten::conv2d",), r"'conv2d' has a rule already"),
    ],
)
def test_wrong_names_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        ff.tracing_rule(*names)(follow)


def test_a_function_that_does_not_take_tracer_and_call_is_refused():
    with pytest.raises(ConfigError, match=r"the rule for filterfold_tests::scale must take \(tracer, call\)"):
        ff.tracing_rule("filterfold_tests::scale")(lambda call: None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda tracer, call: tracer.layout(call["x"])[1:],
        lambda tracer, call: (FIXED, tracer.layout(call["x"])[1], tracer.layout(call["x"])[1], FIXED),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error_that_names_the_rule(wrong):
    ff.tracing_rule("filterfold_tests::scale")(wrong)
    with pytest.raises(TraceError, match=r"the tracing rule for filterfold_tests::scale gives a layout that does not"):
        ff.trace(Net(), X.float())
