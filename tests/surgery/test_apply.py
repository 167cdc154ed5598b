"""Surgery against brute-force index arithmetic, masking, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import filterfold.surgery.apply as surgery
from filterfold.errors import PlanError, SurgeryError
from filterfold.plan import AttributeChange, Cut, Plan, Slice
from filterfold.surgery import cut_cache
from filterfold.surgery.apply import apply
from filterfold.surgery.cut_cache import CutCache
from filterfold.surgery.index_maps import AxisCut, cut_tensor
from filterfold.surgery.layer_attributes import snapshot
from filterfold.utils.modules import named_tensors


class Net(nn.Module):
    """Two coupled layers, a concat, and a flatten: every way in which slices meet."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(10 * 4, 3)
        self.width = 6
        for buffer in (self.norm.running_mean, self.norm.running_var):
            buffer.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        one = self.norm(self.one(x)).relu()
        both = torch.cat([one, self.two(one).relu()], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(both, 2).flatten(1))


def axis(length: int, start: int = 0, total: int | None = None, repeat: int = 1) -> tuple[int, ...]:
    labels = [-1] * (total or length * repeat)
    for unit in range(length):
        for index in range(repeat):
            labels[start + unit * repeat + index] = unit
    return tuple(labels)


def cuts(one: tuple[int, ...], two: tuple[int, ...], **one_weights: tuple[float, ...]) -> Plan:
    six, four = axis(6), axis(4)
    produce = [Slice("one.weight", 0, six, "filter"), Slice("one.bias", 0, six, "bias")]
    produce += [Slice(f"norm.{n}", 0, six, "norm") for n in ("weight", "bias", "running_mean", "running_var")]
    consume = (Slice("two.weight", 1, six, "kernel"), Slice("head.weight", 1, axis(6, 0, 40, 4), "kernel"))
    second = Cut(
        "two",
        two,
        (Slice("two.weight", 0, four, "filter"),),
        (Slice("head.weight", -1, axis(4, 24, 40, 4), "kernel"),),
    )
    return Plan((Cut("one", one, tuple(produce), consume, **one_weights), second))


DROP = cuts((0, -1, 1, 2, -1, 3), (-1, 0, 1, 2))
FOLD = cuts((0, 1, 1, 2, -1, 0), (0, 1, 1, 0))


def seeded(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def bits(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, object]:
    """Everything that a rollback has to bring back, by identity and by value."""
    state: dict[str, object] = {"structure": snapshot(model)}
    for name, tensor in named_tensors(model):
        state[name] = (id(tensor), tensor.detach().clone(), tensor.requires_grad, tensor.stride())
        if tensor.is_leaf and tensor.grad is not None:
            state[f"{name}.grad"] = (id(tensor.grad), tensor.grad.clone())
    for index, optimizer in enumerate(optimizers):
        for place, entries in optimizer.state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    state[f"{index}.{id(place)}.{key}"] = (id(value), value.clone())
    return state


def assert_same_bits(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        pairs = zip(value, other, strict=True) if isinstance(value, tuple) else [(value, other)]
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key


def trained(model: Net, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: object):
    optimizer = kind(model.parameters(), **({"lr": 0.05, "momentum": 0.9} | options))
    for seed in (1, 2):
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def test_drop_is_index_arithmetic():
    model, old = seeded(), seeded()
    apply(DROP, model)
    kept = [0, 2, 3, 5]
    columns = [unit * 4 + i for unit in kept for i in range(4)] + [
        24 + unit * 4 + i for unit in (1, 2, 3) for i in range(4)
    ]
    assert torch.equal(model.one.weight, old.one.weight[kept])
    assert torch.equal(model.one.bias, old.one.bias[kept])
    assert torch.equal(model.norm.running_var, old.norm.running_var[kept])
    assert torch.equal(model.two.weight, old.two.weight[[1, 2, 3]][:, kept])
    assert torch.equal(model.head.weight, old.head.weight[:, columns])
    assert (model.one.out_channels, model.norm.num_features, model.two.in_channels) == (4, 4, 4)
    assert (model.two.out_channels, model.head.in_features) == (3, 28)


def test_drop_equals_the_masked_network():
    model, masked = seeded().eval(), seeded().eval()
    apply(DROP, model)
    with torch.no_grad():
        masked.two.weight[:, [1, 4]] = 0
        masked.head.weight.view(3, 10, 4)[:, [1, 4, 6]] = 0
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)


def test_fold_is_weighted_sums():
    model, old = seeded(), seeded()
    apply(FOLD, model)
    members = [[0, 5], [1, 2], [3]]
    rows = torch.stack([old.one.weight[m].mean(0) for m in members])
    torch.testing.assert_close(model.one.weight.detach(), rows.detach())
    torch.testing.assert_close(model.norm.running_var, torch.stack([old.norm.running_var[m].mean() for m in members]))
    second = torch.stack([old.two.weight[m].mean(0) for m in ([0, 3], [1, 2])])
    kernels = torch.stack([second[:, m].sum(1) for m in members], 1)
    torch.testing.assert_close(model.two.weight.detach(), kernels.detach())
    head = old.head.weight.view(3, 10, 4)
    columns = [head[:, m].sum(1) for m in members] + [head[:, [6, 9]].sum(1), head[:, [7, 8]].sum(1)]
    torch.testing.assert_close(model.head.weight.detach(), torch.cat(columns, 1).detach())


def test_folding_equal_units_changes_nothing():
    model = seeded().float().eval()
    with torch.no_grad():
        for tensor in (model.one.weight, model.one.bias, *model.norm.parameters(), *model.norm.buffers()):
            if tensor.dim():
                tensor[5], tensor[2] = tensor[0], tensor[1]
        model.two.weight[3], model.two.weight[2] = model.two.weight[0], model.two.weight[1]
    plan = cuts((0, 1, 1, 2, 3, 0), (0, 1, 1, 0))
    old = copy.deepcopy(model)
    apply(plan, model)
    assert torch.equal(model.one.weight, old.one.weight[[0, 1, 3, 4]])
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model(x), old(x))


def test_folding_scaled_units_with_blend_and_gain_changes_nothing():
    model = seeded().eval()
    model.norm.eps = 0.0
    with torch.no_grad():
        for tensor in (model.one.weight, model.one.bias, model.norm.running_mean, model.norm.weight, model.norm.bias):
            tensor[5] = 3 * tensor[0]
        model.norm.running_var[5] = 9 * model.norm.running_var[0]
        # γ(x - μ)/σ is scale-free in x, so γ and β carry the factor.
    old = copy.deepcopy(model)
    weights = {"blend": (1.0, 1.0, 1.0, 1.0, 1.0, 0.0), "gain": (1.0, 1.0, 1.0, 1.0, 1.0, 3.0)}
    apply(cuts((0, 1, 2, 3, 4, 0), (0, 1, 2, 3), **weights), model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), old(x), rtol=1e-10, atol=1e-10)


def test_a_flipped_axis_folds_as_it_drops():
    """The new unit lies where its lowest member lay, so an order that the network turns around stays right."""

    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.read = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            return self.read(self.make(x).flip(1))

    model = Flipped().double()
    with torch.no_grad():
        model.make.weight[3], model.make.weight[2] = model.make.weight[0], model.make.weight[1]
    old = copy.deepcopy(model)
    made, read = Slice("make.weight", 0, (0, 1, 2, 3), "filter"), Slice("read.weight", 1, (3, 2, 1, 0), "kernel")
    apply(Plan((Cut("make", (0, 1, 1, 0), (made,), (read,)),)), model)
    x = torch.randn(5, 3).double()
    torch.testing.assert_close(model(x), old(x))


def test_depthwise_shrinks_its_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)).double()
    masked = copy.deepcopy(model)
    made = (
        Slice("0.weight", 0, axis(4), "filter"),
        Slice("0.bias", 0, axis(4), "bias"),
        Slice("1.weight", 0, axis(4, repeat=2), "depthwise"),
        Slice("1.bias", 0, axis(4, repeat=2), "bias"),
    )
    read = (Slice("2.weight", 1, axis(4, repeat=2), "kernel"),)
    apply(Plan((Cut("0", (0, -1, -1, 1), made, read),)), model)
    assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (2, 4, 2)
    with torch.no_grad():
        masked[2].weight[:, 2:6] = 0
    x = torch.randn(2, 3, 5, 5).double()
    torch.testing.assert_close(model(x), masked(x))


def test_tied_weights_are_cut_once_and_both_layers_follow():
    model = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(3, 4, bias=False), "c": nn.Linear(4, 2)})
    model["b"].weight = model["a"].weight
    old = model["a"].weight.detach().clone()
    made = (Slice("a.weight", 0, axis(4), "filter"), Slice("b.weight", 0, axis(4), "filter"))
    apply(Plan((Cut("a", (0, -1, 1, 2), made, (Slice("c.weight", 1, axis(4), "kernel"),)),)), model)
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, old[[0, 2, 3]])
    assert model["a"].out_features == model["b"].out_features == 3


def test_parametrised_weight_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)).double()
    masked = copy.deepcopy(model)
    name = "0.parametrizations.weight.original"
    made = tuple(Slice(n, 0, axis(4), "filter") for n in (f"{name}0", f"{name}1", "0.bias"))
    apply(Plan((Cut("0", (0, -1, 1, 2), made, (Slice("1.weight", 1, axis(4), "kernel"),)),)), model)
    assert model[0].out_features == 3
    with torch.no_grad():
        masked[1].weight[:, 1] = 0
    x = torch.randn(5, 3).double()
    torch.testing.assert_close(model(x), masked(x))


def test_memory_format_dtype_and_requires_grad_stay():
    model = seeded().bfloat16().to(memory_format=torch.channels_last)
    model.one.weight.requires_grad_(False)
    weight = model.two.weight
    apply(DROP, model)
    assert model.two.weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.dtype == torch.bfloat16
    assert not model.one.weight.requires_grad
    assert weight.requires_grad


def test_pointwise_kernels_stay_channels_last_by_their_strides():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).to(memory_format=torch.channels_last)
    made = (Slice("0.weight", 0, axis(4), "filter"), Slice("0.bias", 0, axis(4), "bias"))
    apply(Plan((Cut("0", (0, -1, -1, 1), made, (Slice("1.weight", 1, axis(4), "kernel"),)),)), model)
    assert model[1].weight.stride() == torch.empty(4, 2, 1, 1).to(memory_format=torch.channels_last).stride()


def test_gradients_are_cut_alike_and_hooks_go_on():
    model, old = seeded(), seeded()
    calls = []
    model.two.weight.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    model.two.weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model(x).sum().backward()
    old(x).sum().backward()
    apply(DROP, model)
    assert torch.equal(model.two.weight.grad, old.two.weight.grad[1:][:, [0, 2, 3, 5]])
    model(x).sum().backward()
    assert calls == [(4, 6, 3, 3)] * 2 + [(3, 4, 3, 3)] * 2


def test_a_live_graph_does_not_stop_training():
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    apply(DROP, model, optimizer=optimizer)
    again = model(x).sum()
    again.backward()
    optimizer.step()
    assert loss.grad_fn is not None
    assert model.one.weight.grad.shape == (4, 3, 3, 3)


def test_rollback_is_bit_for_bit():
    model = seeded().to(memory_format=torch.channels_last)
    optimizer = trained(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    before, before_average = bits(model, optimizer), bits(averaged)
    receipt = apply(FOLD, model, optimizer=optimizer, averaged=averaged)
    model.eval()(torch.randn(2, 3, 6, 6, dtype=torch.float64))
    receipt.rollback()
    assert_same_bits(before, bits(model, optimizer))
    assert_same_bits(before_average, bits(averaged))
    receipt.rollback()
    model(torch.randn(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    assert model.one.weight.grad.shape == model.one.weight.shape


@pytest.mark.parametrize("place", ["_swap", "_update", "refresh_attributes", "like"])
@pytest.mark.parametrize("nth", [1, 3])
def test_an_injected_failure_leaves_everything_as_it_was(monkeypatch, place, nth):
    model = seeded()
    optimizer = trained(model)
    averaged = copy.deepcopy(model)
    before, before_average = bits(model, optimizer), bits(averaged)
    original, count = getattr(surgery, place), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == nth:
            raise RuntimeError("broken\nand a second line")
        return original(*args)

    monkeypatch.setattr(surgery, place, failing)
    changes = tuple(AttributeChange("", name, 6, 4) for name in ("width", "first", "second"))
    model.first = model.second = averaged.first = averaged.second = 6
    before["structure"], before_average["structure"] = snapshot(model), snapshot(averaged)
    with pytest.raises(SurgeryError, match=r"^the cut failed and was undone: RuntimeError: broken$"):
        apply(Plan(DROP.cuts, changes), model, optimizer=optimizer, averaged=[averaged])
    assert count == nth
    assert_same_bits(before, bits(model, optimizer))
    assert_same_bits(before_average, bits(averaged))


def test_attributes_of_the_plan_are_rewritten_and_reported():
    model = seeded()
    model.sizes = [6, (6, 1)]
    plan = Plan(DROP.cuts, (AttributeChange("", "width", 6, 4), AttributeChange("", "sizes", (6, (6, 1)), (4, (4, 1)))))
    receipt = apply(plan, model)
    assert model.width == 4
    assert model.sizes == [4, (4, 1)]
    assert AttributeChange("one", "out_channels", 6, 4) in receipt.attributes
    assert AttributeChange("", "width", 6, 4) in receipt.attributes
    assert set(receipt.tensors) == {f"one.{n}" for n in ("weight", "bias")} | {
        f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")
    } | {"two.weight", "head.weight"}
    with pytest.raises(PlanError, match="width is 4, the plan expects 6: was it applied already"):
        apply(Plan((), plan.attributes), model)


def test_copies_are_cut_alike():
    model = seeded()
    averaged, bare = torch.optim.swa_utils.AveragedModel(model), copy.deepcopy(model)
    averaged.update_parameters(model)
    for module in (averaged, bare):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
    apply(DROP, torch.compile(model, backend="eager"), averaged=(averaged, bare))
    assert torch.equal(averaged.module.two.weight, 2 * model.two.weight)
    assert torch.equal(bare.two.weight, 2 * model.two.weight)
    assert bare.head.in_features == averaged.module.head.in_features == 28
    averaged.update_parameters(model)
    assert int(averaged.n_averaged) == 2


def test_compiled_model_runs_after_the_cut():
    model = seeded()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    compiled(x)
    apply(DROP, compiled)
    torch.testing.assert_close(compiled(x), model(x))


def make(part: Slice, assignment: tuple[int, ...] = (0, -1, 1), **options: tuple[float, ...]) -> Plan:
    return Plan((Cut("g", assignment, (part,), (), **options),))


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (
            make(Slice("two.weigth", 0, axis(3), "filter")),
            PlanError,
            "no tensor 'two.weigth'; did you mean 'two.weight'",
        ),
        (make(Slice("two.weight", 0, axis(3), "filter")), PlanError, "two.weight has 4 positions along axis 0, the pl"),
        (
            Plan((*make(Slice("two.weight", 0, (0, 1, 2, -1), "filter")).cuts, *DROP.cuts)),
            PlanError,
            "two.weight: groups 'g' and 'two' both claim the same positions",
        ),
        (make(Slice("one.bias", 0, (0, 0, 1, 2, 2, 2), "bias"), (0, 0, 1)), SurgeryError, "units 0 and 1 can't be fol"),
        (Plan((), (AttributeChange("three", "width", 6, 4),)), PlanError, "no module 'three'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(plan, error, message):
    model = seeded()
    before = bits(model)
    with pytest.raises(error) as caught:
        apply(plan, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same_bits(before, bits(model))


def test_inference_tensors_and_foreign_optimizers_are_refused():
    with torch.inference_mode():
        frozen = seeded()
    with pytest.raises(SurgeryError, match="made under inference_mode"):
        apply(DROP, frozen)
    model = seeded()
    with pytest.raises(SurgeryError, match="SGD holds no parameter of this model"):
        apply(DROP, model, optimizer=torch.optim.SGD(seeded().parameters()))
    assert model.one.out_channels == 6


def test_a_group_norm_that_would_not_divide_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6))
    made = [Slice(n, 0, axis(6), "norm") for n in ("0.weight", "0.bias", "1.weight", "1.bias")]
    before = bits(model)
    with pytest.raises(SurgeryError, match=r"^1: GroupNorm: 5 channels don't divide"):
        apply(Plan((Cut("0", (0, 1, 2, 3, 4, -1), tuple(made), ()),)), model)
    assert_same_bits(before, bits(model))


def test_integer_buffers_keep_the_representative():
    model = nn.Linear(3, 4)
    model.register_buffer("order", torch.tensor([3, 1, 2, 0]))
    parts = (
        Slice("order", 0, axis(4), "scale"),
        Slice("weight", 0, axis(4), "filter"),
        Slice("bias", 0, axis(4), "bias"),
    )
    apply(Plan((Cut("g", (0, 1, 1, -1), parts, ()),)), model)
    assert model.order.tolist() == [3, 1]


def test_nothing_to_do_changes_nothing():
    model = seeded()
    before = bits(model)
    receipt = apply(cuts(tuple(range(6)), tuple(range(4))), model)
    assert receipt.tensors == ()
    assert_same_bits(before, bits(model))


def assert_same_values(expected: nn.Module, model: nn.Module) -> None:
    found = model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())


def test_what_a_rehearsal_has_cut_is_taken_over_as_long_as_nobody_wrote_into_it(monkeypatch):
    expected, model, cut = seeded(), seeded(), CutCache()
    apply(DROP, expected)
    cutting, names = cut_cache.cut_tensor, []
    monkeypatch.setattr(cut_cache, "cut_tensor", lambda *given: names.append(given) or cutting(*given))
    receipt = apply(DROP, model, cache=cut)
    model.one.weight.data.add_(0.0)  # past autograd, so as good as unseen
    with torch.inference_mode():
        model.norm.running_mean.add_(1.0)
    receipt.rollback()
    first = len(names)
    apply(DROP, model, cache=cut)
    assert (first, len(names)) == (8, 9)
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)
    assert_same_values(expected, model)


def test_another_plan_or_other_data_is_cut_anew():
    model, cut = seeded(), CutCache()
    apply(DROP, model, cache=cut).rollback()
    model.two.weight.data = model.two.weight.data + 1.0
    expected = copy.deepcopy(model)
    apply(DROP, expected)
    receipt = apply(DROP, model, cache=cut)
    assert_same_values(expected, model)
    receipt.rollback()
    other = cuts((0, 1, -1, 2, 3, 4), (0, 1, 2, -1))
    apply(other, model, cache=cut)
    assert model.one.out_channels == 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(96, 14, 28, 28), (64, 20 * 49, 4, 6), (48, 512 * 49, 1, 1)])
def test_large_tensors_are_selected_like_small_ones(shape, layout):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(memory_format=layout)
    rows, columns = torch.tensor([0, 3, 4, 31, 39]), torch.tensor([2, 3, 6, 7])
    if shape[1] > 100:
        columns = (torch.tensor([1, 4, 5])[:, None] * 49 + torch.arange(49)).flatten()
    none = torch.empty(0, dtype=torch.int64)
    edit = {a: AxisCut(shape[a], keep, none, none, none.double()) for a, keep in ((0, rows), (1, columns))}
    found = cut_tensor(tensor, edit)
    assert torch.equal(found, tensor[rows][:, columns])
    assert found.is_contiguous(memory_format=layout)
    assert tensor.numel() > 1 << 20


def test_folds_and_drops_keep_the_order_in_memory():
    tensor = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    index = torch.tensor
    fold = AxisCut(4, index([0, 2]), index([0, 1]), index([0, 0]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    found = cut_tensor(tensor, {0: fold})
    assert torch.allclose(found[0], tensor[:2].mean(0))
    assert torch.equal(found[1], tensor[2])
    assert found.stride() == torch.empty(2, 6, 3, 3).to(memory_format=torch.channels_last).stride()
