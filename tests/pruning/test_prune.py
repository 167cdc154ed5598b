"""The verb: one call from model to smaller model, or an error and nothing changed."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import FilterfoldError, SelectionError, VerificationError
from filterfold.plan import Cut, Plan, Slice, keep_units
from filterfold.pruning import scored
from filterfold.pruning.budgets import Selection
from filterfold.pruning.culprits import culprits
from filterfold.pruning.prune import prune
from filterfold.surgery.apply import apply
from filterfold.surgery.layer_attributes import snapshot
from filterfold.surgery.verdict import Verification


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 5))


X = torch.zeros(1, 3, 6, 6)


def test_the_filters_of_smallest_norm_go():
    model, old = net(), net()
    norms = old[0].weight.abs().sum((1, 2, 3))
    kept = sorted(norms.topk(4).indices.tolist())
    result = prune(model, X, keep=0.5)
    assert torch.equal(model[0].weight, old[0].weight[kept])
    assert result.plan.widths == {"0": (8, 4), "3": (6, 3)}
    assert result.verified.ok
    assert result.frozen == {}
    # 3·9·36·C1 + 9·16·C1·C2 + 16·C2·5 by hand
    assert result.before.macs == 27 * 36 * 8 + 9 * 16 * 48 + 16 * 6 * 5
    assert result.after.macs == 27 * 36 * 4 + 9 * 16 * 12 + 16 * 3 * 5
    assert result.after.parameters == sum(p.numel() for p in model.parameters())
    text = str(result)
    assert "MACs        15,168  5,856  38.6%" in text
    assert "the cut network equals the masked one to" in text
    assert result.plan.notes["criterion"] == "l1"


def test_training_goes_on_with_optimizer_and_average():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    prune(model, X, macs=0.5, optimizer=optimizer, averaged=average)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert snapshot(average) == snapshot(model)
    optimizer.zero_grad()
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    average.update_parameters(model)


def test_the_plan_replays_on_a_copy():
    model, copied = net(), net()
    result = prune(model, X, criterion="l2", parameters=0.6, selection=Selection(scope="global"))
    apply(Plan.from_json(result.plan.to_json()), copied)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_budgets_and_patterns_are_passed_on():
    model = net()
    result = prune(model, X, keep={"0": 0.5}, round_to=4, selection=Selection(min_keep=2, ignore=["3"]))
    assert result.plan.widths == {"0": (8, 4)}
    with pytest.raises(SelectionError):
        prune(model, X, macs=0.0001)


def test_inside_inference_mode_the_model_stays_trainable():
    model = net()
    with torch.inference_mode():
        prune(model, X, keep=0.5)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert model[0].weight.grad.shape == (4, 3, 3, 3)


class Sized(nn.Module):
    """Writes a width into its own code; `hidden` keeps it where no repair can reach."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
        self.width = "8" if hidden else 8

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = y.reshape(x.shape[0], int(self.width), *y.shape[2:])
        return self.three(self.two(y).relu())


@pytest.mark.parametrize("verify", [True, False])
def test_sizes_in_user_code_are_rewritten(verify):
    torch.manual_seed(0)
    model = Sized(hidden=False)
    copied = copy.deepcopy(model)
    result = prune(model, X, keep=0.5, verify=verify, averaged=copied)
    assert model.width == copied.width == 4
    assert [(change.attribute, change.old, change.new) for change in result.plan.attributes] == [("width", 8, 4)]
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 2, 5, 5)
    assert (result.verified is None) is not verify


def test_what_cannot_be_repaired_is_named_and_everything_is_as_before(caplog):
    torch.manual_seed(0)
    model = Sized(hidden=True)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    before = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(VerificationError, match=r"^cutting one would be wrong and was not done: ") as caught:
        prune(model, X, keep=0.5, optimizer=optimizer, strict=True)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    with caplog.at_level(logging.WARNING, "filterfold.pruning.prune"):
        result = prune(model, X, keep=0.5, optimizer=optimizer)
    assert set(result.frozen) == {"one"}
    assert "group one fails verification and is left whole" in caplog.text
    assert result.plan.widths == {"two": (6, 3)}
    assert next(g for g in result.groups if g.name == "one").frozen.startswith("failed verification")
    assert "left whole: one: " in str(result)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()


def cut(name: str) -> Cut:
    return Cut(name, keep_units(2, [0]), (Slice(name, 0, (0, 1), "filter"),), ())


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("count", "wrong", "pair"),
    [(8, {"3"}, ()), (9, {"0", "8"}, ()), (5, {"0", "1", "2", "3", "4"}, ()), (16, {"5"}, ("2", "11")), (1, {"0"}, ())],
)
def test_culprits_are_found_by_halving(count, wrong, pair, named):
    """Wrong ones fail alone; of a pair that fails only together, the later one is blamed."""
    plan, tried = Plan(tuple(cut(str(index)) for index in range(count))), []

    def judge(part: Plan) -> Verification:
        names = {c.group for c in part.cuts}
        tried.append(names)
        bad = sorted(names & wrong) or (["both"] if pair and set(pair) <= names else [])
        suspects = tuple(bad[:1]) if named else ()
        return Verification(not bad, None, None, (), f"fails by {','.join(bad)}", suspects=suspects)

    found = culprits(plan, judge)
    assert set(found) == wrong | set(pair[1:])
    assert len(tried) <= 2 + 2 * len(found) * max(1, count.bit_length())


def test_a_wrong_trace_is_caught_before_anything_is_cut(monkeypatch):
    """A slice that the trace forgot."""
    honest = scored.trace_and_measure

    def forgetful(model, inputs):
        traced, cost = honest(model, inputs)
        groups = (
            dataclasses.replace(g, consumers=tuple(dataclasses.replace(p, units=p.units[::-1]) for p in g.consumers))
            if g.name == "0"
            else g
            for g in traced
        )
        return type(traced)(groups, traced.sizes, traced.unmet), cost

    monkeypatch.setattr(scored, "trace_and_measure", forgetful)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(VerificationError, match=r"^cutting 0 would be wrong .* differs from the masked one by "):
        prune(model, X, keep={"0": 0.4, "3": 0.5}, strict=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = prune(model, X, keep={"0": 0.4, "3": 0.5})
    assert result.plan.widths == {"3": (6, 3)}


def test_ignored_groups_are_not_even_scored():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    with pytest.raises(FilterfoldError, match="2"):  # no batch norm follows this layer
        prune(copy.deepcopy(net), torch.zeros(1, 3, 8, 8), criterion="bn-scale", keep=0.5)
    prune(net, torch.zeros(1, 3, 8, 8), criterion="bn-scale", keep=0.5, ignore=["2"])
    assert net[0].out_channels == 4
    assert net[2].out_channels == 6
