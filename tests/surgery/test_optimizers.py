"""One step after the cut equals the step of the masked network, for every optimizer of torch.optim."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import SurgeryError
from filterfold.plan import Cut, Plan, Slice
from filterfold.surgery.apply import apply

KEPT, DROPPED = [0, 2, 3, 5], [1, 4]


def net() -> nn.Sequential:
    """In front of the norm a bias would get no gradient but rounding, and some optimizers make whole steps of it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3), nn.Flatten()]
    return nn.Sequential(*layers).double()


def plan(assignment: tuple[int, ...] = (0, -1, 1, 2, -1, 3), **weights: tuple[float, ...]) -> Plan:
    units = tuple(range(6))
    made = [Slice(f"0.{n}", 0, units, "filter") for n in ("weight", "bias")]
    made += [Slice(f"2.{n}", 0, units, "norm") for n in ("weight", "bias", "running_mean", "running_var")]
    return Plan((Cut("0", assignment, tuple(made), (Slice("3.weight", 1, units, "kernel"),), **weights),))


def batch(seed: int) -> Tensor:
    return torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(batch(seed)).square().mean().backward()
    optimizer.step()


def mask(model: nn.Sequential) -> None:
    """Zero the dropped units' consumers; their parameters then get no gradient but through batch norm's own."""
    with torch.no_grad():
        model[3].weight[:, DROPPED] = 0


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.RAdam, {"lr": 0.01}),
    (torch.optim.Adamax, {"lr": 0.01}),
    (torch.optim.ASGD, {"lr": 0.01}),
    (torch.optim.Rprop, {"lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", None))
def test_one_step_after_the_cut_equals_the_masked_networks_step(kind, options):
    model = net()
    optimizer = kind(model.parameters(), **options)
    for seed in (1, 2, 3):
        step(model, optimizer, seed)
    masked = copy.deepcopy(model)
    twin = kind(masked.parameters(), **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mask(masked)
    apply(plan(), model, optimizer=optimizer)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(p) for p in model.parameters()]]
    step(model, optimizer, 4)
    step(masked, twin, 4)
    for index, name in ((0, "weight"), (0, "bias"), (2, "weight"), (2, "bias"), (2, "running_var")):
        expected = getattr(masked[index], name)[KEPT]
        torch.testing.assert_close(getattr(model[index], name), expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(model[3].weight, masked[3].weight[:, KEPT], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(model[3].bias, masked[3].bias, rtol=1e-7, atol=1e-10)


def folded(tensor: Tensor, axis: int, *, producer: bool) -> Tensor:
    """Units 0 and 5, and 1 and 2, folded; unit 4 dropped: by hand."""
    parts = [tensor.index_select(axis, torch.tensor(m)) for m in ([0, 5], [1, 2], [3])]
    return torch.cat([p.mean(axis, keepdim=True) if producer else p.sum(axis, keepdim=True) for p in parts], axis)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_commutes_with_a_fold(options):
    """Cutting and then stepping with the same gradients equals stepping and then cutting."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    for seed in (1, 2):
        step(model, optimizer, seed)
    model(batch(3)).square().mean().backward()
    later = copy.deepcopy(model)
    twin = torch.optim.SGD(later.parameters(), lr=0.1, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(model.parameters(), later.parameters(), strict=True):
        other.grad = one.grad.clone()
    apply(plan((0, 1, 1, 2, -1, 0)), model, optimizer=optimizer)
    optimizer.step()
    twin.step()
    torch.testing.assert_close(model[0].weight, folded(later[0].weight, 0, producer=True))
    torch.testing.assert_close(model[2].bias, folded(later[2].bias, 0, producer=True))
    torch.testing.assert_close(model[3].weight, folded(later[3].weight, 1, producer=False))


def test_second_moments_are_averaged_and_never_negative():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    for seed in (1, 2):
        step(model, optimizer, seed)
    old = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    signs = {"blend": (0.5, 1.0, 0.0, 1.0, 0.0, 0.5), "gain": (1.0, -2.0, 2.0, 1.0, 1.0, 1.0)}
    apply(plan((0, 1, 1, 2, -1, 0), **signs), model, optimizer=optimizer)
    read, made = model[3].weight, model[0].weight
    first, second = old[read]["exp_avg"], old[read]["exp_avg_sq"]
    torch.testing.assert_close(optimizer.state[read]["exp_avg"][:, 1], -2 * first[:, 1] + 2 * first[:, 2])
    torch.testing.assert_close(optimizer.state[read]["exp_avg_sq"][:, 1], (second[:, 1] + second[:, 2]) / 2)
    torch.testing.assert_close(optimizer.state[made]["exp_avg_sq"][1], old[made]["exp_avg_sq"][1])
    for parameter, state in optimizer.state.items():
        assert all((state[key] >= 0).all() for key in ("exp_avg_sq", "max_exp_avg_sq"))
        assert torch.equal(state["step"], old[parameter]["step"])
    step(model, optimizer, 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_adafactor_keeps_its_factors_fitting():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    optimizer = torch.optim.Adafactor(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3).double()).sum().backward()
        optimizer.step()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    rows, columns = state["0.weight"]["row_var"], state["2.weight"]["col_var"]
    units = tuple(range(6))
    made = tuple(Slice(f"0.{n}", 0, units, "filter") for n in ("weight", "bias"))
    cut = Cut("0", (0, -1, 1, 2, -1, 3), made, (Slice("2.weight", 1, units, "kernel"),))
    apply(Plan((cut,)), model, optimizer=optimizer)
    assert torch.equal(state["0.weight"]["row_var"], rows[KEPT])
    assert torch.equal(state["2.weight"]["col_var"], columns[:, KEPT])
    assert state["0.weight"]["col_var"].shape == (1, 3)
    model(torch.randn(4, 3).double()).sum().backward()
    optimizer.step()


def test_several_optimizers():
    model = net()
    optimizers = [
        torch.optim.SGD(model[:2].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(model[3].parameters()),
    ]
    model(batch(1)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    apply(plan(), model, optimizer=optimizers)
    assert optimizers[0].state[model[0].weight]["momentum_buffer"].shape == (4, 3, 3, 3)
    assert optimizers[1].state[model[3].weight]["exp_avg"].shape == (2, 4, 3, 3)
    with torch.no_grad():
        before = model[3].weight.clone()
    model(batch(2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(before, model[3].weight)


def test_state_that_no_rule_knows_is_refused():
    model = net()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(SurgeryError, match="LBFGS keeps its history as flat vectors"):
        apply(plan(), model, optimizer=lbfgs)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sgd.state[model[0].weight]["flat"] = torch.zeros(162)
    with pytest.raises(SurgeryError, match=r"SGD keeps 'flat' of shape \(162,\) for 0.weight of shape \(6, 3, 3, 3\)"):
        apply(plan(), model, optimizer=sgd)
    assert model[0].weight.shape == (6, 3, 3, 3)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(5, 6, sparse=True), nn.Linear(6, 2))
    model(torch.tensor([1, 2])).sum().backward()
    units = tuple(range(6))
    cut = Cut(
        "0", (0, -1, 1, 2, 3, 4), (Slice("0.weight", 1, units, "filter"),), (Slice("1.weight", 1, units, "kernel"),)
    )
    with pytest.raises(SurgeryError, match=r"0.weight has a sparse gradient"):
        apply(Plan((cut,)), model)
