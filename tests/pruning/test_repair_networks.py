"""Repair of whole networks: computed and shared kernels, attention, inputs of every form, memory, rollback."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import filterfold as ff
from filterfold.errors import ModelError
from filterfold.graph import trace
from filterfold.plan import Cut, Plan, Slice
from filterfold.pruning.budgets import select
from filterfold.pruning.reconstruction import Repair, calibration, passes, repair
from filterfold.surgery.apply import apply


def halved(model: nn.Module, inputs: object, *groups: str) -> Plan:
    found = [entry for entry in trace(model, inputs) if entry.name in groups]
    assert len(found) == len(groups)
    scores = {group.name: torch.arange(group.size, 0, -1.0).double() for group in found}
    plan = select(found, scores, keep=dict.fromkeys(groups, 0.5))
    apply(plan, model)
    return plan


def error(model: nn.Module, original: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        wanted = original(inputs)
        return float((model(inputs) - wanted).norm() / wanted.norm())


class Standardised(nn.Conv2d):
    """Weight standardisation with a gain, as in normaliser-free networks."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, self.gain.flatten(), training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: Standardised(8, 4, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 4, 3)),
    "scaled": lambda: parametrizations.weight_norm(nn.ConvTranspose2d(8, 4, 3), dim=1),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_kernels_are_solved_through_what_they_are_computed_from(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), COMPUTED[kind]()).double().eval()
    x, fresh = torch.randn(2, 40, 3, 7, 7, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "0")
    before = error(model, original, fresh)
    found = repair(model, original, plan, [x])
    assert not found.skipped
    (row,) = found.layers
    assert row.after < row.before
    assert row.after == pytest.approx(error(model, original, x), rel=1e-4)
    assert error(model, original, fresh) < before
    with torch.no_grad():  # as good as it gets by small steps of the parameters: a local optimum
        best = error(model, original, x)
        for parameter in model[2].parameters():
            old = parameter.clone()
            for sign in (1, -1):
                parameter.copy_(old + sign * 1e-2 * torch.randn_like(old))
                assert error(model, original, x) > best * (1 - 1e-3)
            parameter.copy_(old)


def test_weight_norm_is_as_good_as_a_plain_kernel() -> None:
    """Its parameters can make any kernel, so the solution is the same."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 3)).double().eval()
    normed = copy.deepcopy(plain)
    parametrizations.weight_norm(normed[2])
    x, found = torch.randn(20, 3, 7, 7, dtype=torch.float64), []
    for model in (plain, normed):  # a cut changes the norm, so they start from different kernels
        original = copy.deepcopy(model)
        plan = halved(model, x[:1], "0")
        found.append(repair(model, original, plan, [x], ridge=1e-8).layers[0])
    torch.testing.assert_close(normed[2].weight, plain[2].weight, rtol=1e-3, atol=1e-4)
    assert found[1].after == pytest.approx(found[0].after, rel=1e-4)


class Twice(nn.Module):
    """One layer runs on maps of two sizes; `between` is another that also runs twice, each after the first."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.between = nn.Conv2d(4, 4, 3, padding=1) if between else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        one = torch.tanh(self.first(x))
        maps = [self.between(torch.tanh(self.shared(value))) for value in (one, F.avg_pool2d(one, 2))]
        return self.last(maps[0] + F.interpolate(maps[1], scale_factor=2))


@pytest.mark.parametrize("between", [False, True])
def test_a_layer_that_runs_twice_is_solved_for_both_inputs_together(between: bool) -> None:
    torch.manual_seed(0)
    model = Twice(between).double().eval()
    x = torch.randn(10, 3, 6, 6, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "first")
    cut = copy.deepcopy(model)
    found = repair(model, original, plan, [x[:4], x[4:]], ridge=1e-8)
    assert [row.name for row in found.layers] == ["shared", *(["between"] if between else []), "last"]
    with torch.no_grad():
        reads = [torch.tanh(net.first(x)) for net in (cut, original)]
        pairs = [(value, F.avg_pool2d(value, 2)) for value in reads]
        rows = torch.cat([F.unfold(value, 3, padding=1).mT.flatten(0, 1) for value in pairs[0]])
        wanted = torch.cat([original.shared(value).flatten(2).mT.flatten(0, 1) for value in pairs[1]])
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat((rows, ones), 1), wanted).solution
    torch.testing.assert_close(model.shared.weight.flatten(1).T, best[:-1], rtol=1e-4, atol=1e-5)
    assert error(model, original, x) < error(cut, original, x)


def test_what_else_reads_a_kernel_is_named() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self[2].weight.norm()

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, model = torch.randn(30, 6, dtype=torch.float64), Scaled(*plain)
    original = copy.deepcopy(model)
    plan = halved(plain, x[:1], "0")
    weight = model[2].weight.clone()
    found = repair(model, original, plan, [x])
    assert found.layers == ()
    assert found.skipped == {"2.weight": "mul reads it too"}
    assert str(found) == "no layer repaired, 1 skipped"
    assert torch.equal(model[2].weight, weight)


class Tied(nn.Module):
    """A decoder that turns the encoder's kernel around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(4, 8, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(torch.tanh(F.conv2d(torch.tanh(self.first(x)), self.kernel)), self.kernel)


class Rows(nn.Module):
    """Two layers that read halves of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(6, 8), nn.Parameter(torch.randn(7, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        one, two = self.both.split((3, 4))
        return torch.cat((F.linear(y, one), y @ two.t()), -1)


class Chosen(nn.Module):
    """Keeps the examples whose sum is positive, as detectors keep boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.second(y[y.sum(-1) > 0])


def test_kernels_that_several_operations_read() -> None:
    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(10, 3, 5, 5, dtype=torch.float64)
    original, kernel = copy.deepcopy(model), torch.nn.Parameter(model.kernel[:, :4].detach().clone())
    plan = Plan((Cut("first", (0, 1, 2, 3, -1, -1, -1, -1), *slices()),))
    apply(plan, model)
    found = repair(model, original, plan, [x])
    assert found.skipped == {"kernel": "several operations read it, each in its own way"}
    assert torch.equal(model.kernel, kernel)
    model, x = Rows().double(), torch.randn(40, 6, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "first")
    cut = copy.deepcopy(model)
    found = repair(model, original, plan, [x], ridge=1e-9)
    assert [row.name for row in found.layers] == ["both", "both"]
    with torch.no_grad():
        best = torch.linalg.lstsq(torch.tanh(cut.first(x)), original(x)).solution
    torch.testing.assert_close(model.both, nn.Parameter(best.T), rtol=1e-4, atol=1e-5)


def slices() -> tuple[tuple[Slice, ...], tuple[Slice, ...]]:
    units = tuple(range(8))
    producers = Slice("first.weight", 0, units, "filter"), Slice("first.bias", 0, units, "bias")
    return producers, (Slice("kernel", 1, units, "kernel"),)


def test_a_layer_that_runs_on_other_shapes_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Chosen().double(), torch.randn(50, 6, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = Plan(
        (
            Cut(
                "first",
                (0, 1, 2, 3, -1, -1, -1, -1),
                slices()[0],
                (Slice("second.weight", 1, tuple(range(8)), "kernel"),),
            ),
        )
    )
    apply(plan, model)
    weight = model.second.weight.clone()
    found = repair(model, original, plan, [x])
    assert found.skipped == {"second.weight": "it runs on other shapes than in the uncut network"}
    assert torch.equal(model.second.weight, weight)


def test_attention_projections() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            y = y + self.attention(y, y, y, need_weights=False)[0]
            return self.down(torch.tanh(self.up(y)))

    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(40, 5, 6, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = ff.prune(model, x[:1], keep={"up": 0.5}).plan
    cut = error(model, original, x)
    found = repair(model, original, plan, [x])
    assert [row.name for row in found.layers] == ["down"]
    assert error(model, original, x) < cut


def test_inputs_of_every_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
            return self.second(torch.tanh(self.first(x) * scale + shift))

    torch.manual_seed(0)
    original = Two()
    x, shift = torch.randn(10, 3, 4, 4), torch.randn(1, 1, 1)

    def solved(batches: list[object]) -> tuple[Tensor, Repair]:
        model = copy.deepcopy(original)
        found = repair(model, original, halved(model, (x[:1], shift), "first"), batches)
        return model.second.weight.detach(), found

    parts = [x[:4], x[4:8], x[8:]]  # the last is smaller
    wanted, found = solved([((part, shift), 0) for part in parts])
    assert (found.images, found.left_out) == (10, 0)
    for batches in ([{"x": part, "shift": shift} for part in parts], [((x, shift), 0)]):
        assert torch.equal(solved(list(batches))[0], wanted)
    other = [((x[:4], shift), 0), ((x[4:, :, 1:], shift), 0), ((x[4:], shift + 1), 0)]
    found = solved(list(other))[1]
    assert (found.images, found.left_out) == (4, 12)
    assert str(found).endswith("12 of 16 images left out")


def test_images_are_left_out_where_activations_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(64, 3, 10, 10)
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "0")
    each = 4 * 100 * (8 + 8)  # what both sides of the activation take
    monkeypatch.setattr(calibration, "MEMORY", 20 * each)
    for batches in ([x], list(x.split(16))):
        found = repair(copy.deepcopy(model), original, plan, batches)
        assert (found.images, found.left_out) == (20, 44)


def test_a_sample_of_rows_is_nearly_as_good_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    x, fresh = torch.randn(2, 30, 3, 20, 20, dtype=torch.float64)
    errors = []
    for few in (300, 10**6):
        monkeypatch.setattr(passes, "_FEW", few)
        monkeypatch.setattr(passes, "_ROWS", few)
        model = copy.deepcopy(original)
        plan = halved(model, x[:1], "0", "2")
        errors.append(error(model, original, fresh))
        repair(model, original, plan, [x])
        errors.append(error(model, original, fresh))
    assert errors[1] < 1.1 * errors[3] < errors[0]


def test_batch_norms_are_measured_when_they_are_reached() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    with torch.no_grad():
        model[2].bias.add_(1000)  # means far larger than deviations
    model.eval()
    x = torch.randn(20, 3, 8, 8)
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "0")
    repair(model, original, plan, [x])
    made = model[:3](x).double()
    torch.testing.assert_close(model[3].running_mean.double(), made.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[3].running_var.double(), made.var((0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_a_failure_on_the_way_leaves_everything_as_it_was() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
            self.fails, self.seen = False, 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            y = self.second(self.norm(self.first(x)).relu())
            if self.fails:
                raise RuntimeError("out of paper\nand of ink")
            return y

    torch.manual_seed(0)
    model, x = Failing(), torch.randn(8, 3, 4, 4)
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "first")
    model.fails, before, seen = True, copy.deepcopy(model.state_dict()), model.seen
    with pytest.raises(ModelError, match=r"Failing can't run on a batch of the loader: out of paper$"):
        repair(model, original, plan, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.seen, model.training, model.second.weight.requires_grad) == (seen, True, True)


@pytest.mark.parametrize("normed", [False, True])
def test_a_kernel_whose_scale_counts_does_not_grow_beyond_what_fewer_inputs_ask_for(normed: bool) -> None:
    """What is dropped is a hundred times the difference of two inputs that stay, so the best kernel is a large one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3)).double()
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0] + 0.01 * model[0].weight[1]
        model[0].weight[4:] = 100 * (model[0].weight[0] - model[0].weight[1])
        model[0].bias.zero_()
    x = torch.randn(400, 4, dtype=torch.float64)
    model = model.eval() if normed else model[:3]
    original = copy.deepcopy(model)
    plan = halved(model, x[:1], "0")
    (row,) = repair(copy.deepcopy(model), original, plan, [x], ridge=1e-12).layers
    assert row.after < 1e-4
    (row,) = repair(model, original, plan, [x]).layers
    norms = [float(net[2].weight.detach().norm()) for net in (model, original)]
    assert (norms[0] <= 2**0.5 * norms[1]) != normed
    assert row.after < row.before
