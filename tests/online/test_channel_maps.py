"""Feature maps of a student that was cut, against those of its teacher: by hand, and against masked networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold import zoo
from filterfold.errors import ConfigError, ModelError, PlanError
from filterfold.online.folding import fold
from filterfold.plan import keep_units


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def images(count: int = 4, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def dropping(model: nn.Module, **kept: list[int]) -> ff.Plan:
    """The plan that keeps these units of the groups named `conv_0` for "0"."""
    groups = ff.trace(model, images(1)).by_name
    cuts = [
        ff.Cut(name, keep_units(groups[name].size, units), groups[name].producers, groups[name].consumers)
        for name, units in ((key.removeprefix("conv_").replace("_", "."), units) for key, units in kept.items())
    ]
    return ff.Plan(tuple(cuts))


def features_of(model: nn.Module, names: list[str], inputs: Tensor) -> list[np.ndarray]:
    """What modules return in the network's present mode."""
    modules, found = dict(model.named_modules()), {}
    hooks = [
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out.detach().numpy()}))
        for name in names
    ]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return [found[name].copy() for name in names]


def relative(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(((student - teacher) ** 2).mean() / (teacher**2).mean())


def test_after_an_exact_cut_kept_channels_are_the_teachers() -> None:
    model, names = chain().eval(), ["0", "1", "2", "5"]
    distillation = ff.Distillation(model, features=dict.fromkeys(names, 1.0), example_inputs=images(1))
    full = features_of(model, names, images())
    ff.apply(dropping(model, conv_0=[1, 2, 5], conv_3=[0, 3, 4, 7, 10]), model)
    cut = features_of(model, names, images())
    with pytest.raises(
        PlanError, match=r"feature '0': the student has 3 channels, the teacher 8 .* call follow\(plan\)"
    ):
        distillation.loss(images(), model(images()))
    distillation.follow(dropping(chain(), conv_0=[1, 2, 5], conv_3=[0, 3, 4, 7, 10]))
    outputs = model(images())
    found = distillation.loss(images(), outputs)
    by_hand = [
        relative(one, other[:, kept]) for one, other, kept in zip(cut[:3], full[:3], [[1, 2, 5]] * 3, strict=True)
    ]
    assert by_hand == [0, 0, 0]  # the first layer's inputs are the same
    last = relative(cut[3], full[3][:, [0, 3, 4, 7, 10]])
    assert last > 0.01
    with torch.no_grad():
        logits = ff.Distillation(chain().eval()).loss(images(), outputs).item()
    assert found.item() == pytest.approx(logits + last, rel=1e-5)


def test_feature_weights_count() -> None:
    model = chain().eval()
    one, two = ({name: weight} for name, weight in (("2", 1.0), ("2", 3.0)))
    parts = [ff.Distillation(model, features=one_of, example_inputs=images(1)) for one_of in (one, two, {})]
    model[0].weight.data.mul_(2)
    single, triple, none = (part.loss(images(), model(images())).item() for part in parts)
    assert triple - none == pytest.approx(3 * (single - none), rel=1e-4)


def test_two_cuts_compose() -> None:
    model, names = chain().eval(), ["2", "5"]
    distillation = ff.Distillation(model, features=names, example_inputs=images(1))
    full = features_of(model, names, images())
    for plan in ({"conv_0": [0, 2, 4, 6, 7], "conv_3": list(range(1, 12))}, {"conv_0": [1, 2, 4], "conv_3": [0, 5, 9]}):
        cut = dropping(model, **plan)
        ff.apply(cut, model)
        distillation.follow(cut)
    small = features_of(model, names, images())
    wanted = relative(small[0], full[0][:, [2, 4, 7]]) + relative(small[1], full[1][:, [1, 6, 10]])
    outputs = model(images())
    with torch.no_grad():
        logits = ff.Distillation(chain().eval()).loss(images(), outputs).item()
    assert distillation.loss(images(), outputs).item() == pytest.approx(logits + wanted, rel=1e-5)
    with pytest.raises(PlanError, match="the plan 5"):
        distillation.follow(dropping(_cut(chain(), conv_0=[0, 2, 4, 6, 7]), conv_0=[1, 2, 4]))


def _cut(model: nn.Module, **kept: list[int]) -> nn.Module:
    ff.apply(dropping(model, **kept), model)
    return model


@pytest.mark.parametrize("layer", ["conv", "norm", "relu"])
def test_folded_channels_are_what_the_plan_makes_of_the_teachers(layer) -> None:
    """Filters: the plan's sum of rows. Behind them: what the next kernels' gains stand for, by least squares."""
    model = chain().eval()
    model[1].weight.data.uniform_(0.5, 2)
    name = {"conv": "0", "norm": "1", "relu": "2"}[layer]
    groups = ff.trace(model, images(1))
    plan = fold([groups.by_name["0"]], {"0": [0, 1, 0, 2, 1, 0, 3, 4]}, model)
    cut = plan.cuts[0]
    distillation = ff.Distillation(model, features=[name], example_inputs=images(1))
    (full,) = features_of(model, [name], images())
    ff.apply(plan, model)
    distillation.follow(plan)
    weight = next(part.weight for part in cut.producers if part.tensor == "0.weight")
    wanted = np.zeros((4, 5, 8, 8))
    for new in range(5):
        members = [unit for unit in range(8) if cut.assignment[unit] == new]
        if layer == "conv":
            wanted[:, new] = sum(weight[unit] * full[:, unit] for unit in members)
        else:
            system = np.array([[cut.gain[unit]] for unit in members])
            flat = np.stack([full[:, unit].ravel() for unit in members])
            wanted[:, new] = np.linalg.lstsq(system, flat, rcond=None)[0].reshape(4, 8, 8)
    (small,) = features_of(model, [name], images())
    outputs = model(images())
    plain = ff.Distillation(model)
    plain.network = distillation.network
    found = distillation.loss(images(), outputs) - plain.loss(images(), outputs)
    assert found.item() == pytest.approx(relative(small, wanted), rel=1e-4, abs=1e-6)
    if layer == "conv":
        bias = next(part.weight for part in cut.producers if part.tensor == "0.bias")
        assert bias == weight
        assert found.item() < 1e-9  # rows and inputs are the same, so the sum is too


def test_folds_by_plain_clusters_are_means() -> None:
    model = chain().eval()
    distillation = ff.Distillation(model, features=["2"], example_inputs=images(1))
    (full,) = features_of(model, ["2"], images())
    plan = ff.from_clusters(ff.trace(model, images(1)), {"0": [0, 0, -1, 1, 2, 2, 2, 3]})
    ff.apply(plan, model)
    distillation.follow(plan)
    (small,) = features_of(model, ["2"], images())
    members = ([0, 1], [3], [4, 5, 6], [7])
    wanted = np.stack([full[:, units].mean(1) for units in members], 1)
    outputs = model(images())
    plain = ff.Distillation(model)
    plain.network = distillation.network
    found = distillation.loss(images(), outputs) - plain.loss(images(), outputs)
    assert found.item() == pytest.approx(relative(small, wanted), rel=1e-4)


@pytest.mark.parametrize("names", [["layer1", "layer2.0", "layer3", "layer2.1.bn1"]])
def test_residual_blocks_against_the_masked_network(names) -> None:
    """The masked network is as large as the teacher: its channels that are left are the cut network's."""
    torch.manual_seed(0)
    model = zoo.build("resnet20", width=0.5).eval()
    teacher = copy.deepcopy(model)
    inputs = images(3, 16)
    distillation = ff.Distillation(model, features=names, example_inputs=inputs[:1])
    plan = ff.prune(model, inputs[:1], keep=0.6).plan
    distillation.follow(plan)
    full = features_of(teacher, names, inputs)
    with ff.masked(teacher, plan):
        masked = features_of(teacher, names, inputs)
    small = features_of(model, names, inputs)
    total = 0.0
    for name, one, cut, whole in zip(names, masked, small, full, strict=True):
        # Which channels are left is found by looking, not by the plan.
        near = np.array(
            [[np.allclose(one[:, c], cut[:, k], atol=1e-4) for c in range(one.shape[1])] for k in range(cut.shape[1])]
        )
        kept = near.argmax(1)
        assert near.any(1).all(), name
        assert (np.diff(kept) > 0).all()
        total += relative(cut, whole[:, kept])
    outputs = model(inputs)
    plain = ff.Distillation(teacher).loss(inputs, outputs)
    assert distillation.loss(inputs, outputs).item() - plain.item() == pytest.approx(total, rel=1e-3)


class Joined(nn.Module):
    """Channels of two layers side by side, and of one twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.ReLU()
        self.cat, self.norm, self.last = nn.Identity(), nn.BatchNorm2d(10), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.cat(torch.cat([self.act(self.one(x)), self.act(self.two(x))], 1))
        return self.last(self.norm(joined))


def test_joined_channels_and_a_module_that_runs_twice() -> None:
    model, names = Joined().eval(), ["cat", "act"]
    distillation = ff.Distillation(model, features=names, example_inputs=images(1))
    teacher = copy.deepcopy(model)
    cut = dropping(model, one=[1, 3], two=[0, 2, 4])
    ff.apply(cut, model)
    distillation.follow(cut)
    outputs = model(images())
    assert distillation.loss(images(), outputs).item() == ff.Distillation(teacher).loss(images(), outputs).item()
    model.one.weight.data.mul_(2)
    outputs = model(images())
    plain = ff.Distillation(teacher).loss(images(), outputs).item()
    with torch.no_grad():
        one, two = (torch.relu(getattr(teacher, name)(images())).numpy() for name in ("one", "two"))
        student = torch.relu(model.one(images())).numpy()
    first, second = one[:, [1, 3]], two[:, [0, 2, 4]]
    whole = np.concatenate([first, second], 1)
    wanted = relative(np.concatenate([student, second], 1), whole) + relative(student, first) / 2
    assert distillation.loss(images(), outputs).item() - plain == pytest.approx(wanted, rel=1e-4)


class Odd(nn.Module):
    """Modules that make poor features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.idle, self.pair, self.last = nn.Conv2d(3, 4, 1), nn.ReLU(), Twice(), nn.Conv2d(4, 2, 1)
        self.turned, self.head, self.some = nn.Identity(), nn.Linear(4, 2), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(self.conv(x))
        return self.last(x) + self.head(self.turned(x.flatten(2).mT)).mean() + self.some(x[:, :2]).mean()


class Twice(nn.Module):
    def forward(self, x: Tensor):
        return x, x


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("idle", "'idle' does not run"),
        ("pair", "'pair' returns no feature map"),
        ("some", "no parameter has the channels that module 'some' returns"),
    ],
)
def test_features_that_can_not_be_mapped(name, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ff.Distillation(Odd(), features=[name], example_inputs=images(1))


def test_channels_may_lie_along_any_axis_and_stay_in_eval() -> None:
    model = Odd()
    distillation = ff.Distillation(model, features=["turned", "last"], example_inputs=images(1))
    teacher = copy.deepcopy(model)
    cut = dropping(model, conv=[0, 3])
    ff.apply(cut, model)
    distillation.follow(cut)
    model.conv.weight.data.mul_(2)
    outputs = model(images())
    with torch.no_grad():
        wanted, found = (net.conv(images()).flatten(2).mT.numpy() for net in (teacher, model))
        last, small = teacher.last(teacher.conv(images())).numpy(), model.last(model.conv(images())).numpy()
    expected = relative(found, wanted[..., [0, 3]]) + relative(small, last)
    plain = ff.Distillation(teacher).loss(images(), outputs).item()
    assert distillation.loss(images(), outputs).item() - plain == pytest.approx(expected, rel=1e-4)


def test_hooks_leave_copies_and_validation_alone() -> None:
    model = chain()
    distillation = ff.Distillation(model, features=["2"], example_inputs=images(1))
    average = copy.deepcopy(model)
    average(images())
    with torch.no_grad():
        model(images())
    assert distillation._said.take() == {}
    with pytest.raises(ModelError, match="feature '2': seen 0 times"):
        distillation.loss(images(), average(images()))
    outputs = model(images())
    average(images())
    distillation.loss(images(), outputs).backward()
    distillation.remove()
    assert not model._forward_pre_hooks
    assert not model[2]._forward_hooks


def test_a_student_elsewhere_and_a_wrapper() -> None:
    dense = chain()
    student = copy.deepcopy(dense)
    plan = ff.prune(student, images(1), keep=0.5).plan
    distillation = ff.Distillation(dense, student=student, features=["5"], example_inputs=images(1))
    distillation.follow(plan)
    compiled = torch.compile(student, backend="eager")
    plain, found = (distillation.loss(images(), net(images())).item() for net in (student, compiled))
    assert found == pytest.approx(plain, rel=1e-5)
    assert student[0].out_channels == 4


def test_channels_last_gives_the_same() -> None:
    model = chain()
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        network = copy.deepcopy(model).to(memory_format=form)
        distillation = ff.Distillation(network, features=["2"], example_inputs=images(1))
        distillation.follow(ff.prune(network, images(1), keep=0.5).plan)
        found.append(distillation.loss(images(), network(images().to(memory_format=form))).item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)
