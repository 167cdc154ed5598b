"""Two processes train one network: against one process with the same batches, and against each other, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from filterfold import data, zoo
from filterfold.bench.trials.parallel import Parallel
from filterfold.bench.trials.ray import RayCluster
from filterfold.errors import ConfigError
from filterfold.online import OnlineCallback
from filterfold.surgery.layer_attributes import snapshot
from filterfold.training import Recipe, evaluate, fabric, train
from filterfold.utils import distributed

from .conftest import HERE, Launch
from .program import Watch, digest, plain


@pytest.fixture(scope="module")
def both(torchrun: Launch, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(HERE / "program.py", folder)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [entry["count"] for entry in found] == [2, 2]
    return found


@pytest.mark.slow
def test_without_batch_norm_two_processes_do_what_one_does(both: list[dict[str, Any]]) -> None:
    first, second = (entry["exact"] for entry in both)
    model, watch = plain(), Watch()
    recipe = Recipe(epochs=2, batch_size=33, lr=0.05, momentum=0.9, seed=3)
    rows = train(model, data.load("digits", train_limit=200), recipe, callbacks=[watch], device="cpu").rows
    together = [one + other for one, other in zip(first["labels"], second["labels"], strict=True)]
    assert together == watch.labels  # batch for batch the same images, 16 and 17 of 33
    assert [len(labels) for labels in first["labels"]] == [16, 16, 16]
    assert first["weights"] == second["weights"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), tensor, rtol=1e-4, atol=1e-6)
    assert first["losses"] == second["losses"] == pytest.approx([row["train_loss"] for row in rows], rel=1e-5)


@pytest.mark.slow
def test_two_processes_cut_alike_and_end_where_one_does(both: list[dict[str, Any]]) -> None:
    first, second = (entry["online"] for entry in both)
    for key in ("structure", "weights", "plans", "momentum", "events", "validation", "test"):
        assert first[key] == second[key], key
    assert first["validation"] == pytest.approx(first["whole_validation"])

    digits, recipe = data.load("digits"), Recipe(epochs=6, batch_size=64, lr=0.1, schedule="onecycle")
    torch.manual_seed(0)
    model, callback = zoo.build("vgg_small", channels=1, image_size=8, width=0.5), OnlineCallback(keep=0.5)
    train(model, digits, recipe, callbacks=[callback], device="cpu")  # type: ignore[list-item]
    assert snapshot(model) == first["structure"]
    assert model.features[0].out_channels == 8  # half of 16
    assert abs(evaluate(model, digits.test).top1 - first["test"]) < 3  # 359 images; batch norm sees 32 instead of 64

    assert first["stopped"] == second["stopped"] == "three epochs"
    assert (first["observed"], second["observed"]) == ([1, 2, 3], [])
    assert (first["wrote"], second["wrote"]) == (True, False)
    assert first["resumed"] == second["resumed"] == first["weights"]
    alone = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)  # one process takes up what two have left
    callbacks = [OnlineCallback(keep=0.5), Watch()]
    train(alone, digits, recipe, callbacks=callbacks, checkpoint=first["checkpoint"], device="cpu")  # type: ignore[arg-type]
    assert digest(alone) == first["weights"]


@pytest.mark.slow
def test_two_processes_cut_alike_between_batches_and_average_alike(both: list[dict[str, Any]]) -> None:
    first, second = (entry["averaged"] for entry in both)
    assert first == second
    assert first["structure"]["tensors"]["features.0.weight"][0][0] == 8  # half of 16


@pytest.mark.slow
def test_a_plain_loop_recovers_after_a_cut(both: list[dict[str, Any]]) -> None:
    assert [entry["run"]["recovered"] for entry in both] == [3, 3]  # it asserts the rest by itself


@pytest.mark.slow
def test_work_that_can_not_be_sent_is_refused_and_the_next_is_done(both: list[dict[str, Any]]) -> None:
    first, second = (entry["handed_out"] for entry in both)
    assert first["refused"].startswith("the work can't be sent to the other processes (")
    assert first["epochs"] == 1
    assert second == {}  # it follows


@pytest.mark.slow
def test_a_command_runs_once_and_trains_on_all(torchrun: Launch, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    pass\n\n\n"
        "def net(classes):\n    return Net(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(288, classes))\n"
    )
    command = ["-m", "filterfold", "compare", "--methods", "dense,l1,online", "--keep", "0.5", "--data", "digits"]
    command += ["--model", f"{tmp_path / 'nets.py'}:net", "--epochs", "2", "--trials", "1", "--retrain-epochs", "1"]
    command += ["--latency-batches", "none"]
    done = torchrun(*command, "--lr", "0.1", "--device", "cpu", "--threads", "1", "--out", tmp_path / "run")
    assert done.stdout.count("report.html") == 1
    records = [json.loads(path.read_text()) for path in (tmp_path / "run" / "records").glob("*.json")]
    assert sorted(record["method"] for record in records) == ["dense", "l1", "online"]
    for record in records:
        assert record["status"] == "finished"
        assert record["environment"]["processes"] == 2
        assert record["result"]["top1"] > 60
    assert not list((tmp_path / "run" / "work").glob("*.safetensors"))


@pytest.mark.slow
def test_a_refused_command_ends_all_processes(torchrun: Launch, tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--model", "resnet20", "--parallel", "2", "--out", tmp_path / "run"]
    done = torchrun("-m", "filterfold", "compare", *arguments, code=1)
    assert done.stderr.count("torchrun has every process train the same network") == 1


def test_one_or_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for engine in (lambda: Parallel(2), RayCluster):
        with pytest.raises(ConfigError, match="torchrun has every process train the same network, so no t"):
            engine()


def test_parameters_that_no_gradient_reaches_are_noticed() -> None:
    images = torch.zeros(1, 1, 8, 8)
    whole = zoo.build("vgg_small", channels=1, image_size=8, width=0.25)
    assert not fabric._unreached(whole, images)
    whole.spare = torch.nn.Linear(2, 2)
    assert fabric._unreached(whole, images)
    whole.spare.requires_grad_(False)
    assert not fabric._unreached(whole, images)
    assert not fabric._unreached(whole, torch.zeros(1, 3, 8, 8))  # refused later, in one line
    assert whole.training
    assert all(parameter.grad is None for parameter in whole.parameters())


def test_a_program_by_itself_needs_no_agreement() -> None:
    tensor = torch.ones(3)
    assert (distributed.world_size(), distributed.rank(), distributed.local_world_size(), distributed.local_rank()) == (
        1,
        0,
        1,
        0,
    )
    assert distributed.agreed(tensor) is tensor
    assert distributed.decided(lambda: tensor) is tensor
    assert distributed.summed(tensor) is tensor
    distributed.averaged([tensor])
    distributed.shared([tensor])
    assert tensor.tolist() == [1, 1, 1]
    with pytest.raises(ZeroDivisionError):
        distributed.decided(lambda: 1 / 0)


@pytest.mark.slow
def test_lightning_recovers_after_a_cut(torchrun: Launch, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    torchrun(HERE / "lightning_ddp.py", tmp_path / "last.ckpt")  # it asserts by itself


@pytest.mark.slow
def test_the_example_runs(torchrun: Launch) -> None:
    shown = torchrun(HERE.parents[1] / "examples" / "ddp.py").stdout
    assert float(shown.split("test accuracy ")[1].split()[0]) > 90
    assert shown.count("units, 0.") == 3
