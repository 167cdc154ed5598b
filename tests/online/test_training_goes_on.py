"""Training goes on after an online cut: the next step is what it would have been, whatever is wrapped around."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from filterfold.online import CutOptions, OnlineFilterClustering, Pull, Schedule

X = torch.zeros(1, 1, 6, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12 * 9, 16), nn.ReLU(), nn.Linear(16, 3)),
    )


GROUPS = {
    "0": ("0.weight", "0.bias", "1.weight", "1.bias"),
    "4": ("4.weight", "5.weight", "5.bias"),
    "8": ("8.weight",),
}
BEHIND = {"0": (2, "4.weight"), "4": (6, "8.weight"), "8": (9, "10.weight")}
"""Group → the activation that gives its units, and the kernels that read them."""


def batch(index: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(16, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), x.mean((1, 2, 3)).mul(20).long().clamp(-1, 1) + 1


def step(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, index: int) -> float:
    x, y = batch(index, optimizer.param_groups[0]["params"][0].dtype)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.1, amsgrad=True)


@pytest.mark.parametrize("method", ["l1", "random", "fpgm"])
@pytest.mark.parametrize("kind", [sgd, adamw])
@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"macs": 0.4, "cutting": CutOptions(features="filters")}])
def test_the_next_steps_are_those_of_the_masked_network(kind, method: str, budget) -> None:
    model = net().double()
    optimizer = kind(model.parameters())
    for index in range(3):
        step(model, optimizer, index)
    masked = copy.deepcopy(model)
    same = kind(masked.parameters())
    same.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    online = OnlineFilterClustering(model, X.double(), optimizer, method=method, **budget)
    plan = online.cluster_and_prune().plan
    kept = {cut.group: torch.tensor([new >= 0 for new in cut.assignment]) for cut in plan.cuts}
    assert any(not keep.all() for keep in kept.values())
    for name, keep in kept.items():
        shape = (1, -1, 1, 1) if name != "8" else (1, -1)
        masked[BEHIND[name][0]].register_forward_hook(lambda _m, _i, y, k=keep, s=shape: y * k.view(s))
    for index in range(3, 8):
        torch.testing.assert_close(step(model, optimizer, index), step(masked, same, index), rtol=1e-10, atol=1e-12)
        wanted = dict(masked.named_parameters())
        for name, value in model.named_parameters():
            there = wanted[name]
            for group, names in GROUPS.items():
                if name in (*names, "8.bias" if group == "8" else "") and group in kept:
                    there = there[kept[group]]
                if name == BEHIND[group][1] and group in kept:
                    keep = kept[group].repeat_interleave(9) if group == "4" else kept[group]
                    there = there[:, keep]
            torch.testing.assert_close(value, there, rtol=1e-9, atol=1e-11)


def test_the_step_after_an_exact_fold_is_the_members_steps_taken_together() -> None:
    """Of equal units with gradients g and momenta m: producers get mean m and Σ g, consumers Σ m and any one's g."""
    rate, momentum = 0.05, 0.9
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum)
    for index in range(3):
        step(model, optimizer, index)
    with torch.no_grad():  # units 4 … 7 of the first layer become equal to 0 … 3, all that reads them stays as it is
        for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
            if tensor.ndim:
                tensor[4:] = tensor[:4]
    before = copy.deepcopy(model)
    buffers = {name: optimizer.state[value]["momentum_buffer"].clone() for name, value in model.named_parameters()}
    x, y = batch(9)
    loss = functional.cross_entropy(before(x), y)
    loss.backward()
    online = OnlineFilterClustering(model, X.double(), optimizer, clusters={"0": 4})
    result = online.cluster_and_prune()
    assert result.exact
    assert set(result.plan.widths) == {"0"}
    assert step(model, optimizer, 9) == pytest.approx(loss.item(), rel=1e-12)
    after, old = dict(model.named_parameters()), dict(before.named_parameters())
    shares = {piece.tensor: torch.tensor(piece.weight, dtype=torch.float64) for piece in result.plan.cuts[0].producers}
    for name in GROUPS["0"]:
        value, gradient, buffer = old[name].detach(), old[name].grad, buffers[name]
        share = shares[name].view(-1, *[1] * (value.ndim - 1))  # important members count more in the mean
        torch.testing.assert_close(share[:4] + share[4:], torch.ones_like(share[:4]), rtol=1e-6, atol=1e-6)
        blended = share * buffer
        moved = momentum * (blended[:4] + blended[4:]) + gradient[:4] + gradient[4:]
        torch.testing.assert_close(after[name], value[:4] - rate * moved, rtol=1e-10, atol=1e-12)
    kernel, gradient, buffer = old["4.weight"].detach(), old["4.weight"].grad, buffers["4.weight"]
    torch.testing.assert_close(gradient[:, :4], gradient[:, 4:])
    moved = momentum * (buffer[:, :4] + buffer[:, 4:]) + gradient[:, :4]
    wanted = kernel[:, :4] + kernel[:, 4:] - rate * moved
    torch.testing.assert_close(after["4.weight"], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pull", ["cosine", "centripetal"])
def test_a_compiled_network_recovers(pull) -> None:
    model = net()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    schedule = Schedule((1, 2), ((2, 0.5), (3, 1.0)))
    runs = []
    for network, plain in ((compiled, model), (twin, twin)):
        optimizer = sgd(plain.parameters())
        online = OnlineFilterClustering(network, X, optimizer, keep=0.5, schedule=schedule, pull=pull)
        losses = []
        for epoch in range(1, 5):
            x, y = batch(epoch, torch.float32)
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(x), y) + online.loss()
            loss.backward()
            online.merge_gradients()
            optimizer.step()
            losses.append(loss.item())
            online.step(epoch)
        assert plain[0].out_channels == 4
        runs.append((losses, network(batch(7, torch.float32)[0])))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-4)


def test_loss_scaler_average_and_learning_rate_follow() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    schedule = Schedule((1, 2, 3), ((3, 0.5), (5, 1.0)))
    online = OnlineFilterClustering(
        model, X, optimizer, keep=0.5, schedule=schedule, averaged=average, pull=Pull("centripetal", 1.0)
    )
    used = []
    for epoch in range(1, 9):
        x, y = batch(epoch, torch.float32)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        online.merge_gradients()
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        used.append(optimizer.param_groups[0]["lr"])
        rates.step()
        online.step(epoch)
    assert model[0].out_channels == average.module[0].out_channels == 4
    assert used == pytest.approx([0.05 * (1 + torch.tensor(torch.pi * t / 8).cos().item()) / 2 for t in range(8)])
    assert scaler.get_scale() == 2.0**12  # it grew twice: no step overflowed, none was skipped
    for one, two in zip(model.parameters(), average.module.parameters(), strict=True):
        assert one.shape == two.shape
        assert not torch.equal(one, two)
    old = [value.clone() for value in average.module.parameters()]
    average.update_parameters(model)
    for before, value, now in zip(old, model.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * value)


def test_the_average_of_equal_networks_stays_equal_through_a_fold() -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    OnlineFilterClustering(model, X, sgd(model.parameters()), keep=0.5, averaged=average).cluster_and_prune()
    for one, two in zip(model.state_dict().values(), average.module.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)
