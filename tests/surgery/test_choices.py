"""Random numbers and decisions in forward: neither makes a right cut look wrong, nor a wrong one right."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff
from filterfold.plan import Plan
from filterfold.surgery.verify import rehearse, verify


class Net(nn.Module):
    """Two layers that can be cut, and scores that tie up to a difference of rounding size, which follows the cut."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.box = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)
        self.s = nn.Conv2d(12, 2, 1, bias=False)
        self.code = nn.Parameter(torch.randn(2, 2))
        with torch.no_grad():
            self.s.weight[1] = self.s.weight[0]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(self.a(x).relu()).relu()
        tilt = 1e-12 * (y.shape[1] - 9)
        s = self.s(y) + torch.tensor([tilt, -tilt], dtype=x.dtype).view(1, 2, 1, 1)
        box = self.box(y)
        if self.how == "topk":
            best, place = s.flatten(1).topk(5)
            return best, box.flatten(1).gather(1, place)
        if self.how == "codebook":
            return (self.code[s.argmax(1)],)
        if self.how == "rounded":
            return (((s - s.flip(1)) * 4 + 0.5).round() * box,)
        if self.how == "greatest":
            value, place = s.max(1)
            return value, box.gather(1, place[:, None])
        return (box[:, 0] * (s[:, 0] > s[:, 1]),)


def built(how: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(how).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)


JUMPS = ("topk", "codebook", "rounded", "greatest", "compared")


@pytest.mark.parametrize("how", JUMPS)
def test_outputs_that_jump_are_judged_with_the_same_decisions(how: str) -> None:
    model, x = built(how)
    original = model(x)
    result = ff.prune(model, x, keep=0.5, ignore=["s", "box"], strict=True)
    assert result.plan.widths == {"a": (8, 4), "b": (12, 6)}
    assert result.verified
    assert len(original) == len(model(x))


@pytest.mark.parametrize("how", JUMPS)
def test_a_wrong_cut_before_a_decision_is_seen(how: str) -> None:
    """Another order of the kernels that read a layer; with the codebook the outputs alone would not show it."""
    model, x = built(how)
    groups = ff.trace(model, x)
    plan = ff.select(groups, ff.score(groups, model, "l1"), keep=0.5, ignore=["s", "box"])
    wrong = Plan(
        tuple(
            dataclasses.replace(
                cut, consumers=tuple(dataclasses.replace(part, units=part.units[::-1]) for part in cut.consumers)
            )
            if cut.group == "b"
            else cut
            for cut in plan.cuts
        )
    )
    assert rehearse(model, plan, x, groups=groups)
    found = rehearse(model, wrong, x, groups=groups)
    assert not found
    assert "differs from the masked one" in found.message


def test_a_finished_cut_is_judged_with_the_same_decisions() -> None:
    original, x = built("codebook")
    model, _ = built("codebook")
    plan = ff.prune(model, x, keep=0.5, ignore=["s", "box"]).plan
    assert verify(model, original, plan, x)


class Noisy(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        if self.how == "dropout":
            y = F.dropout(y, 0.5)
        elif self.how == "noise":
            y = y + torch.randn_like(y) * torch.rand(y.shape, dtype=y.dtype)
        elif self.how == "mask":
            y = y * torch.bernoulli(torch.full_like(y, 0.5))
        elif self.how == "in place":
            y = y + torch.empty_like(y).normal_(0, 2).uniform_()
        elif self.how == "places":
            y = y[..., torch.randperm(y.shape[-1])] + torch.randint(0, 3, (1,))
        else:
            y = torch.normal(y, y.abs()) + torch.multinomial(torch.ones(5), 2).sum()
        return self.c(y.relu())


@pytest.mark.parametrize("how", ["dropout", "noise", "mask", "in place", "places", "sampled"])
def test_random_numbers_are_held_still(how: str) -> None:
    torch.manual_seed(0)
    model, x = Noisy(how).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    result = ff.prune(model, x, keep=0.5, strict=True)
    assert result.plan.widths == {"a": (8, 4), "b": (12, 6)}
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), model(x))  # its own randomness is as it was
