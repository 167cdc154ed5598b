"""A family of children: each what `prune` and `repair` alone would have made, and the original untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import filterfold as ff
from filterfold.errors import ConfigError, DataError, PlanError, SelectionError
from filterfold.pruning import scored
from filterfold.zoo import build

pytestmark = pytest.mark.slow

SHARES = [0.8, 0.6, 0.4]


def images(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet20", width=0.5, image_size=16)


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(images(1))
    return counter.get_total_flops() // 2


def state(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, [m.training for m in model.modules()], hooks, torch.get_rng_state()


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    tensors = all(value.equal(other[0][name]) for name, value in one[0].items()) and one[0].keys() == other[0].keys()
    return tensors and one[1:3] == other[1:3] and torch.equal(one[3], other[3])


def test_each_child_is_what_prune_and_repair_make_and_the_original_stays():
    model, batches = network(), list(images().split(24))
    model.layer2.eval()
    model(images(8)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = state(model)
    children = list(ff.shrink(model, images(1), macs=SHARES, calibration=batches))
    assert same(before, state(model))
    assert all(parameter.grad is old for parameter, old in zip(model.parameters(), gradients, strict=True))
    assert [child.share for child in children] == SHARES
    for child in children:
        alone = copy.deepcopy(model)
        result = ff.prune(
            alone,
            images(1),
            macs=child.share,
            criterion="reconstruction",
            loader=batches,
            selection=ff.Selection(scope="global"),
        )
        ff.repair(alone, model, result.plan, batches)
        assert child.plan == result.plan
        assert child.cost == result.after
        assert child.pruned.verified.ok
        assert child.repair.layers
        own, other = child.network.state_dict(), alone.state_dict()
        assert own.keys() == other.keys()
        assert all(value.equal(other[name]) for name, value in own.items())
        assert [m.training for m in child.network.modules()] == before[1]
        assert 0.9 * child.share < macs(child.network) / macs(model) <= child.share


@pytest.mark.parametrize("remedy", [None, "norms"])
def test_other_remedies_and_criteria(remedy):
    model, batches = network(), list(images().split(24))
    [child] = ff.shrink(
        model,
        images(1),
        macs=[0.5],
        calibration=batches,
        criterion="l1",
        remedy=remedy,
        selection=ff.Selection(round_to=2),
    )
    alone = copy.deepcopy(model)
    ff.prune(alone, images(1), macs=0.5, round_to=2)
    if remedy:
        ff.reestimate(alone, batches)
    assert child.repair is None
    assert all(value.equal(alone.state_dict()[name]) for name, value in child.network.state_dict().items())


def test_tracing_scores_and_calibration_are_shared_and_missing_ones_can_follow(monkeypatch):
    traced, read = [], []
    honest = scored.trace_and_measure
    monkeypatch.setattr(scored, "trace_and_measure", lambda *a: traced.append(1) or honest(*a))

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images().split(8):
            read.append(1)
            yield batch, torch.zeros(8)

    model = network()
    children = list(ff.shrink(model, images(1), macs=SHARES, calibration=loader(), batches=4))
    assert (len(traced), len(read)) == (1, 4)
    [again] = ff.shrink(model, images(1), macs=SHARES[2:], calibration=loader(), batches=4)
    assert again.plan == children[2].plan
    expected = children[2].network.state_dict()
    assert all(value.equal(expected[name]) for name, value in again.network.state_dict().items())


def test_the_criterion_suits_what_follows():
    family = ff.shrink(network(), images(1), macs=[0.5], calibration=[images()])
    trained = ff.shrink(network(), images(1), macs=[0.5], calibration=[images()], train=lambda _child: None)
    names = [next(found).plan.notes["criterion"] for found in (family, trained)]
    assert names == ["reconstruction", "reconstruction-then-train"]


def test_a_share_that_cannot_be_met_is_refused_before_anything_is_trained():
    model, trained = network(), []
    before = state(model)
    with pytest.raises(SelectionError):
        ff.shrink(model, images(1), macs=[0.8, 1e-6], calibration=[images()], train=trained.append)
    assert trained == []
    assert same(before, state(model))


def test_a_training_that_fails_leaves_the_others_and_the_original_whole():
    model, trained = network(), []

    def train(child: ff.Child) -> None:
        trained.append(child.share)
        with torch.no_grad():
            for parameter in child.network.parameters():
                parameter.zero_()
        if len(trained) == 2:
            raise RuntimeError("out of luck")

    before = state(model)
    family = ff.shrink(model, images(1), macs=SHARES, calibration=[images()], train=train)
    assert trained == []  # all is planned, nothing is made yet
    first = next(family)
    with pytest.raises(RuntimeError, match="out of luck"):
        next(family)
    assert list(family) == []
    assert trained == SHARES[:2]
    assert not any(parameter.any() for parameter in first.network.parameters())
    assert same(before, state(model))


def test_one_teacher_for_all_and_features_by_each_plan():
    model = network()
    teacher = ff.Distillation(model, features=["layer2.0.conv1"], example_inputs=images(1))
    hooked = state(model)
    losses: dict[float, tuple[float, float]] = {}

    def train(child: ff.Child) -> None:
        distillation = child.distillation
        assert distillation is not None
        assert distillation.network is teacher.network
        assert (teacher.followed, distillation.followed) == (0, 1)
        outputs = child.network.eval()(images(8))
        loss = distillation.loss(images(8), outputs)
        loss.backward()
        seen: dict[str, Tensor] = {}
        for name, net in (("own", child.network), ("uncut", teacher.network)):
            handle = net.layer2[0].conv1.register_forward_hook(lambda *a, name=name: seen.update({name: a[2]}))
            net(images(8))
            handle.remove()
        [cut] = [cut for cut in child.plan.cuts if cut.group == "layer2.0.conv1"]
        kept = [unit for unit, place in enumerate(cut.assignment) if place >= 0]
        assert len(kept) < cut.size
        wanted = seen["uncut"][:, kept]
        feature = (seen["own"] - wanted).square().mean() / wanted.square().mean()
        log_q, log_p = (net(images(8)).div(2).log_softmax(1) for net in (child.network, teacher.network))
        output = 4 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
        losses[child.share] = loss.item(), (output + feature).item()

    children = list(
        ff.shrink(
            model,
            images(1),
            macs=[0.8, 0.5],
            calibration=[images()],
            criterion="l1",
            distillation=teacher,
            train=train,
        )
    )
    assert [*losses] == [0.8, 0.5]
    for found, wanted in losses.values():
        assert found == pytest.approx(wanted, rel=1e-4)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for c in children for m in c.network.modules())
    assert same(hooked, state(model))
    with pytest.raises(PlanError):
        teacher.for_student(children[0].network, children[0].plan).follow(children[1].plan)


def test_in_inference_mode_children_can_be_trained():
    model = network()
    with torch.inference_mode():
        [child] = ff.shrink(model, images(1), macs=[0.5], calibration=[images()], criterion="l1")
    child.network(images(4)).sum().backward()
    assert child.network.linear.weight.grad is not None


def test_what_makes_no_sense_is_refused():
    model = network()
    for options, error, words in (
        ({"macs": []}, ConfigError, "give a share for each child"),
        ({"macs": [0.5, 0.5]}, ConfigError, "each once"),
        ({"macs": [1.5]}, SelectionError, "macs"),
        ({"remedy": "kernel"}, ConfigError, "unknown remedy 'kernel'"),
        ({"batches": 0}, ConfigError, "batches=0"),
        ({"calibration": []}, DataError, "gave no batch"),
        ({"distillation": ff.Distillation(model)}, ConfigError, "no effect without train="),
    ):
        with pytest.raises(error, match=words):
            ff.shrink(model, images(1), **({"macs": [0.5], "calibration": [images()]} | options))
