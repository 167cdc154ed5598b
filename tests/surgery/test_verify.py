"""Verification finds what is wrong, accepts what is right, and gives everything back."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import VerificationError
from filterfold.graph.trace import trace
from filterfold.plan import AttributeChange, ChannelGroup, Cut, Plan, Slice, keep_units
from filterfold.surgery import masking
from filterfold.surgery.apply import apply
from filterfold.surgery.layer_attributes import snapshot
from filterfold.surgery.masking import masked, permuted
from filterfold.surgery.verify import rehearse, verify
from filterfold.utils.inputs import leaves, outputs
from filterfold.utils.model_state import preserved
from filterfold.utils.modules import named_tensors


class Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.norm(self.one(x)).relu()
        both = torch.cat([one, self.two(one).relu()], 1)
        return {"classes": self.head(both.mean((2, 3)))}


def seeded(norm: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    return Net(norm)


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def planned(model: nn.Module, assign: dict[str, tuple[int, ...]], **weights: tuple[float, ...]) -> tuple[Plan, tuple]:
    groups = trace(model, X)
    cuts = [
        Cut(name, new, groups.by_name[name].producers, groups.by_name[name].consumers) for name, new in assign.items()
    ]
    cuts[0] = dataclasses.replace(cuts[0], **weights)
    return Plan(tuple(cuts)), groups


def state(model: nn.Module) -> dict[str, object]:
    tensors = {n: (id(t), t.data_ptr(), t.detach().clone(), t.dtype, t.requires_grad) for n, t in named_tensors(model)}
    grads = {n: (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    modes = {n: m.training for n, m in model.named_modules()}
    return {"tensors": tensors, "grads": grads, "modes": modes, "sizes": snapshot(model), "names": set(vars(model))}


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for kind in ("modes", "sizes", "names"):
        assert before[kind] == after[kind]
    for kind in ("tensors", "grads"):
        assert before[kind].keys() == after[kind].keys()
        for name, values in before[kind].items():
            for a, b in zip(values, after[kind][name], strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


DROP = {"one": (0, -1, 1, 2, -1, 3), "two": (-1, 0, 1, 2)}
FOLD = {"one": (0, 1, 1, 2, -1, 0), "two": (0, 1, 1, 0)}


@pytest.mark.parametrize("assign", [DROP, FOLD])
def test_a_right_cut_is_accepted_and_everything_is_given_back(assign):
    model = seeded()
    plan, groups = planned(model, assign, gain=(1.0, 2.0, -0.5, 1.0, 1.0, 1.0))
    model(X)["classes"].sum().backward()
    model.norm.eval()
    before, random = state(model), torch.get_rng_state()
    assert rehearse(model, plan, X, groups=groups).ok
    small = copy.deepcopy(model)
    apply(plan, small)
    found = verify(small, model, plan, X, groups=groups)
    assert found.ok
    assert found.masking_error < 1e-5
    assert found.permutation_error is None
    assert str(found).startswith("the cut network equals the masked one to ")
    assert_same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())


def test_masked_zeroes_the_kernels_that_read_dropped_units():
    model = seeded()
    plan, _ = planned(model, DROP)
    old = copy.deepcopy(model)
    with masked(model, plan):
        assert (model.two.weight[:, [1, 4]] == 0).all()
        assert (model.head.weight[:, [1, 4, 6]] == 0).all()
        kept = [0, 2, 3, 5]
        assert torch.equal(model.two.weight[:, kept], old.two.weight[:, kept])
        assert torch.equal(model.one.weight, old.one.weight)
    assert torch.equal(model.two.weight, old.two.weight)


def test_a_fold_of_different_units_is_judged_by_imposing_the_folded_unit():
    """By hand: both units of the pair get the mean of their rows; kernels are weighted by the gain."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    imposed = copy.deepcopy(model)
    units = (0, 1, 2)
    made = tuple(Slice(name, 0, units, "filter") for name in ("0.weight", "0.bias"))
    plan = Plan((Cut("0", (0, 1, 0), made, (Slice("2.weight", 1, units, "kernel"),), gain=(2.0, 1.0, -1.0)),))
    with torch.no_grad():
        for tensor in (imposed[0].weight, imposed[0].bias):
            tensor[0] = tensor[2] = (tensor[0] + tensor[2]) / 2
        imposed[2].weight.mul_(torch.tensor([2.0, 1.0, -1.0]))
    x = torch.randn(4, 3)
    with masked(model, plan):
        torch.testing.assert_close(model(x), imposed(x))
    apply(plan, model)
    torch.testing.assert_close(model(x), imposed(x))


def without(plan: Plan, tensor: str) -> Plan:
    """The plan with a slice forgotten, as a wrong trace would."""
    cuts = [dataclasses.replace(c, consumers=tuple(p for p in c.consumers if p.tensor != tensor)) for c in plan.cuts]
    return Plan(tuple(cuts))


def shifted(plan: Plan, tensor: str, units: tuple[int, ...]) -> Plan:
    """The plan with the order of one slice mistaken."""
    cuts = [
        dataclasses.replace(
            cut,
            consumers=tuple(dataclasses.replace(p, units=units) if p.tensor == tensor else p for p in cut.consumers),
            producers=tuple(dataclasses.replace(p, units=units) if p.tensor == tensor else p for p in cut.producers),
        )
        for cut in plan.cuts
    ]
    return Plan(tuple(cuts))


def test_a_forgotten_slice_is_a_failing_network():
    model = seeded()
    plan, groups = planned(model, {"one": DROP["one"]})
    found = rehearse(model, without(plan, "head.weight"), X, groups=groups)
    assert not found
    assert found.message.startswith("the cut network fails: RuntimeError: mat1 and mat2")
    assert found.masking_error is None


@pytest.mark.parametrize("tensor", ["two.weight", "norm.weight", "norm.running_var", "one.bias"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_mistaken_order_is_a_mismatch_even_in_a_fresh_network(tensor, zero):
    """A fresh batch norm has equal entries everywhere, and a scale of zero hides its branch."""
    model = seeded()
    if zero:
        nn.init.zeros_(model.norm.weight)
    before = state(model)
    plan, groups = planned(model, {"one": DROP["one"]})
    found = rehearse(model, shifted(plan, tensor, (1, 0, 2, 3, 4, 5)), X, groups=groups)
    assert not found.ok
    assert found.masking_error > 1e-4
    assert "differs from the masked one" in found.message
    assert_same(before, state(model))


def test_verify_sees_a_wrong_pruned_network():
    model = seeded()
    plan, groups = planned(model, DROP)
    small = copy.deepcopy(model)
    apply(plan, small)
    with torch.no_grad():
        small.two.weight[0, 0] += 0.1
    found = verify(small, model, plan, X, groups=groups)
    assert not found.ok
    assert found.masking_error > 1e-3


def test_rounding_is_decided_in_float64():
    """An amplifying network makes the float32 error large although the cut is right."""

    class Amplifying(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 256), nn.Linear(256, 2)

        def forward(self, x):
            return (1e4 * self.two(self.one(x).relu())).sin()

    torch.manual_seed(0)
    model, x = Amplifying(), torch.randn(64, 3)
    (group, *_) = trace(model, x)
    plan = Plan((Cut("one", tuple(unit % 86 for unit in range(256)), group.producers, group.consumers),))
    found = rehearse(model, plan, x)
    assert found.ok
    assert "float64" in found.message
    assert model.one.weight.dtype == torch.float32
    assert not rehearse(model, plan, x, tolerance=1e-12).ok


def test_groups_that_normalise_over_channels_are_judged_by_permutation():
    model = seeded(nn.GroupNorm(2, 6))
    plan, groups = planned(model, {"one": (0, -1, 1, 2, -1, 3), "two": DROP["two"]})
    assert not groups.by_name["one"].exact
    found = rehearse(model, plan, X, groups=groups)
    assert found.ok
    assert found.inexact == ("one",)
    assert found.permutation_error < 1e-5
    assert found.masking_error < 1e-5, "the other group is held against the network in which this one is cut"
    assert "not mask-exact: one (permutation error" in found.message
    wrong = shifted(plan, "norm.weight", (1, 0, 2, 3, 4, 5))
    refused = rehearse(model, wrong, X, groups=groups)
    assert not refused.ok
    assert "permuting one changes the network" in refused.message


def test_permutation_shuffles_within_cells_only():
    model = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 2))
    cut = Cut("0", tuple(range(6)), (Slice("0.weight", 0, (0, 1, 2, 3, 4, 5), "filter"),), ())
    old = model[0].weight.detach().clone()
    with permuted(model, [cut], {"0": "aaabbb"}, torch.Generator().manual_seed(1)):
        new = model[0].weight.detach()
        assert not torch.equal(new, old)
        assert {tuple(row.tolist()) for row in new[:3]} == {tuple(row.tolist()) for row in old[:3]}
    assert torch.equal(model[0].weight, old)


def test_repair_is_asked_for_the_groups_that_masking_cannot_judge():
    class Sized(Net):
        def __init__(self):
            super().__init__(nn.GroupNorm(2, 6))
            self.width = 6

        def forward(self, x):
            return super().forward(x[:, :, : self.width]) if self.one.out_channels == self.width else 1 / 0

    torch.manual_seed(0)
    model = Sized()
    plan, groups = planned(model, {"one": (0, -1, 1, 2, -1, 3), "two": DROP["two"]})
    asked = []

    def repair(model: nn.Module, part: Plan, inputs: object, **_: object) -> tuple[AttributeChange, ...]:
        asked.append([cut.group for cut in part.cuts])
        model.width = 4
        return (AttributeChange("", "width", 6, 4),)

    found = rehearse(model, plan, X, groups=groups, rewrite=repair)
    assert found.masking_error < 1e-5
    assert asked == [["one", "two"], ["one"]]
    assert found.attributes == (AttributeChange("", "width", 6, 4),)
    assert model.width == 6
    apply(Plan(plan.cuts, found.attributes), copy.deepcopy(model))
    known = rehearse(model, Plan(plan.cuts, found.attributes), X, groups=groups)
    assert known.ok
    assert known.masking_error is None
    assert known.message.startswith("the cut network runs, but one can't be compared with a masked one (permutation")
    assert rehearse(model, plan, X, groups=groups).message.startswith("the cut network fails: ZeroDivisionError")
    assert model.width == 6


def test_constant_inputs_become_noise_and_caches_are_given_back():
    class Caching(Net):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            self.cache.setdefault("first", x)
            self.last = x
            return super().forward(x)

    torch.manual_seed(0)
    model = Caching()
    with torch.no_grad():
        model.one.bias.zero_()
    units = tuple(range(6))
    made = [Slice(f"one.{n}", 0, units, "filter") for n in ("weight", "bias")]
    made += [Slice(f"norm.{n}", 0, units, "norm") for n in ("weight", "bias", "running_mean", "running_var")]
    read = [Slice("two.weight", 1, units, "kernel"), Slice("head.weight", 1, (*units, -1, -1, -1, -1), "kernel")]
    cut = Cut("one", keep_units(6, [0, 2]), tuple(made), tuple(read))
    assert rehearse(model, Plan((cut,)), torch.zeros(2, 3, 6, 6)).ok
    assert model.cache == {}
    assert not hasattr(model, "last")


def test_networks_that_do_not_run_are_refused_in_one_line():
    model = seeded()
    plan, groups = planned(model, DROP)
    with pytest.raises(VerificationError, match=r"^the model fails before any cut: RuntimeError: .*"):
        rehearse(model, plan, torch.randn(2, 5, 6, 6), groups=groups)
    with pytest.raises(VerificationError, match="copy it before cutting"):
        verify(model, model, plan, X)


def test_an_overflow_under_random_values_falls_back_to_the_models_own():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)

    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x) / (self.net(x).abs().max() == 0)

    plan = Plan(
        tuple(
            Cut(g.name, (0, -1, 1, 2, 3, 4), g.producers, g.consumers) for g in trace(Exploding(), X[0, 0, :, :3])[:1]
        )
    )
    assert rehearse(Exploding(), plan, torch.randn(2, 3)).ok


def test_outputs_of_every_kind_are_compared():
    @dataclasses.dataclass
    class Result:
        value: Tensor
        others: tuple[Tensor, ...]

    class Plain:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    a, b, c, d = (torch.tensor([float(i)]) for i in range(4))
    assert [float(v) for v in leaves([Result(a, (b,)), {"x": Plain(c), "y": (d, None, 3)}])] == [0, 1, 2, 3]


def test_borrowing_leaves_no_trace_and_dropout_is_the_same_every_time():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    random = torch.get_rng_state()
    first, second = (outputs(Noisy(), X)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(random, torch.get_rng_state())
    model = seeded()
    before = state(model)
    with preserved(model, dtype=torch.float64, generic=True):
        model(X.double())["classes"].sum().backward()
        assert model.norm.weight.std() > 0
    assert_same(before, state(model))


def test_a_group_that_is_neither_exact_nor_symmetric_is_reported():
    model = seeded()
    plan, groups = planned(model, DROP)
    odd: list[ChannelGroup] = [dataclasses.replace(g, exact=g.name != "one", symmetric=False) for g in groups]
    found = rehearse(model, plan, X, groups=odd)
    assert found.ok
    assert "not mask-exact: one (not compared at all)" in found.message


@pytest.mark.parametrize("alone", [True, False])
def test_large_layers_are_masked_in_their_own_memory_only_if_nothing_else_reads_it(monkeypatch, alone):
    monkeypatch.setattr(masking, "_LARGE", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5), nn.Linear(5, 5))
    if not alone:
        model.also = nn.Parameter(model[2].weight.data.view(-1))
    read = Slice("2.weight", 1, tuple(unit for unit in range(4) for _ in range(9)), "kernel")
    again = Slice("3.weight", 1, (0, 1, 2, 3, 4), "kernel")
    plan = Plan((Cut("0", (-1, 0, 1, -1), (), (read,)), Cut("2", (0, -1, -1, 1, 2), (), (again,))))
    before = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in model.state_dict().items()}
    with masked(model, plan):
        found = model[2].weight.detach().clone()
        assert (model[2].weight.data_ptr() == before["2.weight"][0]) == alone
        assert (model[3].weight[:, 1:3] == 0).all()
    wanted = before["2.weight"][1].clone()
    wanted[:, :9], wanted[:, 27:] = 0, 0
    assert torch.equal(found, wanted)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_two_groups_masked_in_the_same_memory_are_given_back_in_turn(monkeypatch):
    monkeypatch.setattr(masking, "_LARGE", 1)
    model = nn.Linear(6, 2)
    before = model.weight.detach().clone()
    one, two = Slice("weight", 1, (0, 1, 2, -1, -1, -1), "kernel"), Slice("weight", 1, (-1, -1, -1, 0, 1, 2), "kernel")
    cuts = Cut("one", (0, -1, 1), (), (one,)), Cut("two", (-1, 0, -1), (), (two,), gain=(1.0, 2.0, 1.0))
    with masked(model, Plan(cuts)):
        assert torch.equal(model.weight, before * torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 0.0]))
    assert torch.equal(model.weight, before)
