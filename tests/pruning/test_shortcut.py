"""Coupled layers that follow a projection shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import ConfigError
from filterfold.graph import trace
from filterfold.pruning.criteria import score
from filterfold.pruning.prune import prune
from filterfold.pruning.scored import Scoring


class Block(nn.Module):
    """A residual block whose stream is made by a projection and by its last convolution."""

    def __init__(self, kernel: int, name: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 8, kernel, padding=kernel // 2)
        self.add_module(name, nn.Conv2d(3, 8, 1))
        self.shortcut_name = name
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.last(torch.relu(self.first(images)))
        return self.head(torch.relu(inner + self.get_submodule(self.shortcut_name)(images))).mean((2, 3))


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(3, "downsample"), (1, "downsample"), (3, "side")],
    ids=["by both", "by name, as in bottleneck blocks", "by its kernel"],
)
def test_the_projection_decides(kernel: int, name: str) -> None:
    torch.manual_seed(0)
    model, example = Block(kernel, name), torch.zeros(1, 3, 8, 8)
    groups = trace(model, example)
    [coupled] = [group for group in groups if any(part.tensor == "last.weight" for part in group.producers)]
    size = {key: model.get_submodule(key).weight.detach().abs().sum((1, 2, 3)) for key in ("last", name)}  # type: ignore[operator,union-attr]
    torch.testing.assert_close(score(groups, model)[coupled.name].float(), size["last"] + size[name])
    torch.testing.assert_close(score(groups, model, follow="shortcut")[coupled.name].float(), size[name])
    kept = size[name].topk(4).indices.sort().values
    before = model.get_submodule("last").weight.detach().clone()  # type: ignore[operator,union-attr]
    prune(model, example, keep={coupled.name: 0.5}, scoring=Scoring(follow="shortcut"))
    assert torch.equal(model.get_submodule("last").weight.detach(), before[kept])  # type: ignore[operator,union-attr]


def test_groups_without_a_projection_are_scored_as_ever() -> None:
    model, example = Block(1, "side"), torch.zeros(1, 3, 8, 8)
    groups = trace(model, example)
    usual, following = score(groups, model), score(groups, model, follow="shortcut")
    assert all(torch.equal(usual[name], following[name]) for name in usual)


def test_unknown_guides_are_refused() -> None:
    model = Block(3, "side")
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="follow='main': must be 'shortcut' or None"):
        score(groups, model, follow="main")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="order='hasty'"):
        Scoring(order="hasty")  # type: ignore[arg-type]
