"""What may follow a cut: batch norms measured anew, kernels repaired, the uncut network as a teacher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from filterfold import data, zoo
from filterfold.bench.trials.config import Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.method_names import DISTILL
from filterfold.bench.trials.setting import Setting
from filterfold.bench.trials.trial import run_trial
from filterfold.errors import ConfigError
from filterfold.online import CutOptions, OnlineCallback, OnlineFilterClustering, Schedule
from filterfold.profiling.macs import measure
from filterfold.training import Recipe, train

pytestmark = pytest.mark.slow


def small() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("vgg_small", channels=1, image_size=8, width=0.25)


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits", train_limit=300)


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    model = small()
    train(model, digits, Recipe(epochs=4, batch_size=50, lr=0.05), device="cpu")
    return model


def cut(model: nn.Module, digits: data.ImageData, remedy, batches: list[Tensor], keep: float = 0.6) -> nn.Module:
    network = copy.deepcopy(model)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    online = OnlineFilterClustering(
        network, digits.example, optimizer, keep=keep, cutting=CutOptions(remedy=remedy, loader=batches)
    )
    online.cluster_and_prune()
    return network


def batches(digits: data.ImageData) -> list[Tensor]:
    return [images for images, _ in data.batches(digits.train, 150)]


def test_measured_norms_hold_the_statistics_of_what_they_see(digits, trained) -> None:
    found = cut(trained, digits, "norms", batches(digits))
    plain = cut(trained, digits, None, [])
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))
    first = next(module for module in found.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    first.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with torch.no_grad():
        for images in batches(digits):
            found.eval()(images)
    mean = torch.stack([entry.mean((0, 2, 3)) for entry in seen]).mean(0)
    assert first.running_mean is not None
    assert torch.allclose(first.running_mean, mean, atol=1e-5)


def test_repaired_kernels_bring_the_outputs_back(digits, trained) -> None:
    images = torch.cat(batches(digits))
    wanted = trained.eval()(images).detach()

    @torch.no_grad()
    def error(remedy) -> float:
        network = cut(trained, digits, remedy, batches(digits)).eval()
        return float((network(images) - wanted).norm() / wanted.norm())

    plain, norms, kernels = error(None), error("norms"), error("kernels")
    assert kernels < 0.8 * norms
    assert kernels < plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remedy": "norms"}, "needs a loader"),
        ({"remedy": "prayer", "loader": []}, "unknown remedy 'prayer'"),
    ],
)
def test_remedies_that_can_not_be(digits, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        CutOptions(**options)
    for options in ({"distill": -1}, {"distill": float("nan")}, {"distill": 1, "temperature": 0}):
        with pytest.raises(ConfigError, match=f"{list(options)[-1]}={list(options.values())[-1]}"):
            OnlineCallback(keep=0.5, **options)


def run(model: nn.Module, digits, callback: OnlineCallback, path: Path | None = None, check=None):
    recipe = Recipe(epochs=4, batch_size=50, lr=0.05)
    return train(model, digits, recipe, callbacks=(callback,), checkpoint=path, check=check, device="cpu")


def test_the_teacher_is_the_network_before_its_first_cut_and_is_paid_for(digits) -> None:
    schedule = Schedule((), ((1, 0.5), (2, 1.0)))
    model, callback = small(), OnlineCallback(keep=0.5, schedule=schedule, distill=1.0)
    dense, full = small(), measure(small(), digits.example).macs
    recipe = Recipe(epochs=4, batch_size=50, lr=0.05)
    kept: dict[str, Tensor] = {}

    def stop(_seconds: float) -> None:
        kept.update({name: value.clone() for name, value in dense.state_dict().items()})
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(dense, digits, recipe, check=stop, device="cpu")
    history = run(model, digits, callback)
    assert callback.teacher is not None
    assert all(torch.equal(value, kept[name]) for name, value in callback.teacher.network.state_dict().items())
    assert [row.get("extra_macs") for row in history.rows] == [None, full, full, full]
    untaught = small()
    run(untaught, digits, OnlineCallback(keep=0.5, schedule=schedule))
    assert not torch.equal(next(model.parameters()), next(untaught.parameters()))


def test_an_interrupted_run_keeps_its_teacher(digits, tmp_path) -> None:
    def callback() -> OnlineCallback:
        return OnlineCallback(keep=0.5, schedule=Schedule((), ((1, 0.5), (2, 1.0))), distill=1.0)

    whole, again, seen = small(), small(), []
    rows = run(whole, digits, callback()).rows

    def stop(seconds: float) -> None:
        seen.append(seconds)
        if len(seen) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(small(), digits, callback(), tmp_path / "state", stop)
    found = run(again, digits, callback(), tmp_path / "state").rows
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert [row.get("extra_macs") for row in found] == [row.get("extra_macs") for row in rows]


def test_additions_reach_the_trial(tmp_path) -> None:
    setting = Setting(
        "vgg_small", "digits", width=0.25, data_options={"train_limit": 256}, recipe={"epochs": 3, "lr": 0.05}
    )
    bench = RunContext(setting, tmp_path, "cpu")
    top1 = {}
    methods = ("online", "online+repair", "online-l1+repair+distill", "online+centripetal", "online+unpulled")
    for method in methods:
        record = run_trial(Trial(method, 0, setting, keep=0.5), bench)
        assert record["result"] is not None
        top1[method] = record["history"][-1]["train_loss"]
        taught = [row.get("extra_macs", 0) for row in record["history"]]
        assert taught == ([0, record["dense"]["macs"], record["dense"]["macs"]] if "distill" in method else [0, 0, 0])
        steps = sum(3 * macs for macs in (record["dense"]["macs"], *(row["macs"] for row in record["history"][:-1])))
        assert record["result"]["train_macs"] == 256 * (steps + sum(taught))
    assert len(set(top1.values())) == len(methods)
    assert 0 < DISTILL < 1
