"""The uncut network as a teacher: losses by hand in NumPy and SciPy, cost, resume."""

from __future__ import annotations

import copy
import importlib.util
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn import functional

import filterfold as ff
from filterfold.errors import CheckpointError, ConfigError, ModelError
from filterfold.utils.io import load_tree, save_tree

from .test_channel_maps import chain, features_of, images

# --- outputs --------------------------------------------------------------------------------------


def test_class_scores_are_compared_as_hinton_does() -> None:
    teacher = nn.Linear(4, 3)
    inputs, logits = torch.randn(6, 4), torch.randn(6, 3, requires_grad=True)
    distillation = ff.Distillation(teacher, temperature=3.0)
    loss = distillation.loss(inputs, logits)
    loss.backward()
    p, q = softmax(teacher(inputs).detach().numpy() / 3, 1), softmax(logits.detach().numpy() / 3, 1)
    assert loss.item() == pytest.approx(9 * entropy(p, q, axis=1).mean(), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.numpy() == pytest.approx(3 * (q - p) / 6, abs=1e-6)  # the gradient that section 2.1 derives


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_objective_is_a_weighted_mean_of_task_and_teacher(weight) -> None:
    model, inputs = chain(), images()
    distillation = ff.Distillation(model, weight=weight)
    model[0].weight.data.mul_(2)
    outputs = model(inputs)
    task, taught = functional.cross_entropy(outputs, torch.arange(4)), distillation.loss(inputs, outputs)
    found = distillation(inputs, outputs, task)
    assert found.item() == pytest.approx((1 - weight) * task.item() + weight * taught.item(), rel=1e-6)
    assert taught.item() > 1e-4


def test_logit_maps_are_compared_position_by_position() -> None:
    teacher, student = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    found = ff.Distillation(teacher).loss(images(), student(images()))
    t, s = (net(images()).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 4) / 2 for net in (teacher, student))
    assert found.item() == pytest.approx(4 * entropy(softmax(t, 1), softmax(s, 1), axis=1).mean(), rel=1e-4)


def test_gradients_reach_the_student_only_and_the_teacher_stays() -> None:
    model = chain().train()
    distillation = ff.Distillation(model, features=["2"], example_inputs=images(1))
    kept = copy.deepcopy(distillation.network.state_dict())
    state = torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(images())
        distillation(images(), outputs, functional.cross_entropy(outputs, torch.arange(4))).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in distillation.network.parameters()
    )
    assert not any(module.training for module in distillation.network.modules())
    assert all(torch.equal(value, kept[name]) for name, value in distillation.network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    shared = {tensor.data_ptr() for tensor in model.parameters()}
    assert not shared & {tensor.data_ptr() for tensor in distillation.network.parameters()}


@dataclass
class Answer:
    logits: Tensor
    boxes: list[Tensor]
    note: str = "x"


Pair = namedtuple("Pair", "scores boxes")


class Headed(nn.Module):
    """A network that answers in some structure."""

    def __init__(self, form) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.score, self.box, self.form = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), form

    def forward(self, x: Tensor):
        return self.form(self.score(x), self.box(x))


def moved(model: Headed) -> Headed:
    student = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return student


@pytest.mark.parametrize(
    ("form", "losses"),
    [
        (lambda s, b: {"scores": s, "boxes": b}, {"scores": "kl", "boxes": "mse"}),
        (lambda s, b: (s, b), {0: "kl", 1: "mse"}),
        (lambda s, b: [s, b], {0: "kl", -1: "mse"}),
        (lambda s, b: Pair(s, b), {"scores": "kl", "boxes": "mse"}),
        (lambda s, b: Answer(s, [b]), {"logits": "kl", "boxes": {0: "mse"}}),
        (lambda s, b: Answer(s, [b]), {"logits": "kl", "boxes": "mse"}),
        (lambda s, b: {"a": {"b": (s, b)}}, {"a": {"b": {0: "kl", 1: functional.mse_loss}}}),
        (lambda s, b: (s, b), lambda one, two: KL(one[0], two[0]) + functional.mse_loss(one[1], two[1])),
    ],
)
def test_any_structure_of_outputs_with_a_loss_for_each(form, losses) -> None:
    model = Headed(form)
    student = moved(model)
    found = ff.Distillation(model, losses=losses).loss(images(), student(images()))
    (t, s), (box, moved_box) = (
        [getattr(net, part)(images()).detach().numpy() for net in (model, student)] for part in ("score", "box")
    )
    p, log_p, log_q = softmax(t / 2, 1), log_softmax(t / 2, 1), log_softmax(s / 2, 1)
    wanted = 4 * (p * (log_p - log_q)).sum(1).mean() + ((box - moved_box) ** 2).mean()
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def KL(student: Tensor, teacher: Tensor) -> Tensor:
    rows = [value.movedim(1, -1).flatten(0, -2) / 2 for value in (student, teacher)]
    return 4 * functional.kl_div(rows[0].log_softmax(1), rows[1].softmax(1), reduction="batchmean")


def test_a_model_output_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="transformers is not installed")
    model = Headed(lambda s, b: outputs.ImageClassifierOutput(loss=None, logits=s.mean((2, 3)), hidden_states=(b,)))
    student = moved(model)
    found = ff.Distillation(model, losses={"logits": "kl"}).loss(images(), student(images()))
    plain = Headed(lambda s, b: s.mean((2, 3)))
    assert found.item() == ff.Distillation(plain).loss(images(), student(images()).logits).item()


def test_single_scores_are_compared_by_themselves() -> None:
    teacher, student = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)
    found = ff.Distillation(teacher, losses="binary", temperature=3.0).loss(images(), student(images()))
    p, q = (expit(net(images()).detach().numpy().ravel() / 3) for net in (teacher, student))
    wanted = 9 * entropy(np.stack([p, 1 - p]), np.stack([q, 1 - q])).mean()
    assert found.item() == pytest.approx(wanted, rel=1e-3)
    same = ff.Distillation(student, losses="binary").loss(images(), student(images()))
    assert same.item() == pytest.approx(0, abs=1e-7)


class Detector(nn.Module):
    """Three levels; in eval mode the head decodes them into one tensor, as YOLO's does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = Head()

    def forward(self, x: Tensor):
        return self.head(self.stem(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)) for _ in range(3))

    def forward(self, x: Tensor):
        levels = [level(functional.avg_pool2d(x, 2**i)) for i, level in enumerate(self.levels)]
        return levels if self.training else torch.cat([level.flatten(2) for level in levels], 2).sigmoid()


def test_a_detector_with_a_list_of_outputs_learns_while_cut() -> None:
    torch.manual_seed(0)
    model = Detector()
    refused = ff.Distillation(model, losses="mse")
    with pytest.raises(ModelError, match=r"only the student returns output\[0\].*in_training"):
        refused.loss(images(), model(images()))
    distillation = ff.Distillation(
        model, losses="mse", in_training=["head"], features=["stem"], example_inputs=images(1)
    )
    assert not any(isinstance(m, nn.BatchNorm2d) and m.training for m in distillation.network.modules())
    distillation.follow(ff.prune(model, images(1), keep=0.5).plan)
    assert model.stem[0].out_channels == 4
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(20):
        outputs = model.train()(images())
        loss = distillation(images(), outputs, task=outputs[0].mean() * 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ConfigError, match="in_training: the network has no module 'heads'"):
        ff.Distillation(model, in_training=["heads"])


@pytest.mark.parametrize(
    ("form", "losses", "message"),
    [
        (
            lambda s, b: {"scores": s, "boxes": b},
            None,
            r"returns output\['scores'\] \(4, 4, 8, 8\), output\['boxes'\].*losses=",
        ),
        (lambda s, b: [s, b], None, r"Say how to compare"),
        (lambda s, b: s[:, :1], None, r"returns output \(4, 1, 8, 8\): not one tensor of class scores"),
        (lambda s, b: s.mean((1, 2, 3)), None, r"returns output \(4,\)"),
        (lambda s, b: s[:, :1], "kl", r"output \(4, 1, 8, 8\) has no two classes along axis 1"),
        (lambda s, b: s.argmax(1), "mse", r"no floating-point tensor"),
        (lambda s, b: {"scores": s}, {"logits": "kl"}, r"the student's output has no 'logits'; it has \['scores'\]"),
        (lambda s, b: (s, b), {2: "kl"}, r"has no 2; it has \[0\], \[1\]"),
        (lambda s, b: s, lambda one, two: one - two, r"must return a scalar"),
    ],
)
def test_outputs_that_can_not_be_compared(form, losses, message) -> None:
    model = Headed(form)
    with pytest.raises(ModelError, match=message):
        ff.Distillation(model, losses=losses).loss(images(), model(images()))


def test_another_head_is_refused_by_name() -> None:
    model = chain()
    distillation = ff.Distillation(model)
    model[8] = nn.Linear(12, 3)
    with pytest.raises(
        ModelError, match=r"shape \(4, 3\) in the student, \(4, 5\) in the teacher: was the head replaced"
    ):
        distillation.loss(images(), model(images()))
    with pytest.raises(ModelError, match="scalar"):
        distillation(images(), model(images()), torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"weight": -0.1}, "weight=-0.1"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": 2}, "weight=2"),
        ({"losses": "cosine"}, "losses='cosine': must be 'kl'"),
        ({"losses": {}}, "empty mapping"),
        ({"losses": {"a": None}}, r"losses\['a'\]=None"),
        ({"features": "0"}, r"\['0'\]"),
        ({"features": ["0"]}, "give example_inputs"),
        ({"features": {"0": -1.0}}, "weight -1.0 of '0'"),
        ({"features": ["02"], "example_inputs": images(1)}, "no module '02'; did you mean"),
        ({"features": ["8"], "example_inputs": images(1), "student": nn.Linear(2, 2)}, "the student has no module '8'"),
    ],
)
def test_options_that_make_no_sense(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ff.Distillation(chain(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype) -> None:
    model = chain()
    distillation = ff.Distillation(model, features=["3"], example_inputs=images(1))
    model[0].weight.data.mul_(1.5)
    plain = distillation.loss(images(), model(images()))
    with torch.autocast("cpu", dtype):
        found = distillation.loss(images(), model(images()))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(plain.item(), rel=0.05)
    found.backward()
    wide = copy.deepcopy(model).double()
    assert ff.Distillation(wide).loss(images().double(), wide(images().double())).dtype == torch.float64


# --- cost and resume ------------------------------------------------------------------------------


def test_the_teachers_cost_is_that_of_the_uncut_network() -> None:
    model = chain()
    distillation = ff.Distillation(model)
    ff.prune(model, images(1), keep=0.5)
    assert distillation.macs(images()) == 3 * 8 * 9 * 64 + 8 * 12 * 9 * 64 + 12 * 5


def train(model: nn.Module, distillation: ff.Distillation, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        outputs = model(images())
        loss = distillation(images(), outputs, functional.cross_entropy(outputs, torch.arange(4)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, form) -> None:
    model = chain().to(memory_format=form)
    distillation = ff.Distillation(model, features=["2", "5"], example_inputs=images(1))
    plan = ff.from_clusters(ff.trace(model, images(1)), {"0": [0, 0, -1, 1, 2, 2, 2, 3], "3": [*range(10), 9, 9]})
    ff.apply(plan, model)
    distillation.follow(plan)
    train(model, distillation, 3)
    save_tree(tmp_path / "teacher", distillation.state_dict())
    again = copy.deepcopy(model)
    train(model, distillation, 3)
    resumed = ff.Distillation(again, features=["2", "5"], example_inputs=images(1))
    resumed.load_state_dict(load_tree(tmp_path / "teacher"))
    assert resumed.network[0].out_channels == 8
    assert resumed.macs(images()) == distillation.macs(images())
    train(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_network_that_shrinks_while_it_learns(tmp_path) -> None:
    """Three folds; interrupted after the second, with a teacher from the state."""

    def started(model: nn.Module) -> tuple[ff.OnlineFilterClustering, ff.Distillation]:
        schedule = ff.Schedule((), ((1, 0.4), (2, 0.7), (3, 1.0)))
        online = ff.OnlineFilterClustering(model, images(1), keep=0.5, schedule=schedule)
        return online, ff.Distillation(model, features=["2", "5"], example_inputs=images(1))

    def go(model: nn.Module, online: ff.OnlineFilterClustering, distillation: ff.Distillation, epochs: range) -> None:
        for epoch in epochs:
            train(model, distillation, 2)
            online.step(epoch)
            for plan in online.plans[distillation.followed :]:
                distillation.follow(plan)
        assert distillation.followed == len(online.plans) == epochs.stop - 1

    model = chain()
    online, distillation = started(model)
    full = features_of(model.eval(), ["2"], images())[0]
    go(model.train(), online, distillation, range(1, 3))
    save_tree(tmp_path / "state", [online.state_dict(), distillation.state_dict()])
    again = copy.deepcopy(model)
    go(model, online, distillation, range(3, 4))
    resumed, teacher = started(again)
    for part, state in zip((resumed, teacher), load_tree(tmp_path / "state"), strict=True):
        part.load_state_dict(state)
    go(again, resumed, teacher, range(3, 4))
    for network, its in ((model, distillation), (again, teacher)):
        assert network[0].out_channels == 4
        train(network, its, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    taught = its._maps["2"][0].of(torch.from_numpy(full)).numpy()
    wanted = full
    for plan in online.plans:  # unit by unit
        cut = next(cut for cut in plan.cuts if cut.group == "0")
        gain = np.array(cut.gain or [1] * cut.size)
        parts = [np.flatnonzero(np.array(cut.assignment) == new) for new in range(cut.new_size)]
        wanted = np.stack([np.tensordot(gain[p], wanted[:, p], (0, 1)) / (gain[p] ** 2).sum() for p in parts], 1)
    assert taught == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_example_runs() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    path = Path(__file__).resolve().parents[2] / "examples" / "distillation.py"
    spec = importlib.util.spec_from_file_location("distillation_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(epochs=4)
    assert after > max(before, 95)


def test_states_that_do_not_fit() -> None:
    model = chain()
    distillation = ff.Distillation(model)
    state = distillation.state_dict()
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match="another architecture"):
        ff.Distillation(other).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"of features \[\], not \['2'\]"):
        ff.Distillation(model, features=["2"], example_inputs=images(1)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="damaged"):
        distillation.load_state_dict({"structure": state["structure"]})
    torn = {**state, "tensors": {**state["tensors"], "0.bias": torch.zeros(3)}}
    before = copy.deepcopy(distillation.network.state_dict())
    with pytest.raises(CheckpointError, match="not the sizes"):
        distillation.load_state_dict(torn)
    with pytest.raises(CheckpointError, match="channel map"):
        ff.Distillation(model, features=["2"], example_inputs=images(1)).load_state_dict(
            {**state, "features": {"2": [{"axis": 1}]}}
        )
    assert all(torch.equal(value, before[name]) for name, value in distillation.network.state_dict().items())
