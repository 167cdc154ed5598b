"""A teacher in the training loop: the loss by hand, features through cuts, resumed to the bit with everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from filterfold import data, save, zoo
from filterfold.bench.trials.config import Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.costs import LONGER, paid_epochs
from filterfold.bench.trials.setting import Setting
from filterfold.bench.trials.trial import check, run_trial
from filterfold.errors import CheckpointError, ConfigError, RecordError
from filterfold.online import Distillation, DistillationCallback, OnlineCallback
from filterfold.profiling.macs import measure
from filterfold.surgery.weights import Weights
from filterfold.training import Recipe, train

pytestmark = pytest.mark.slow


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.build("vgg_small", channels=1, image_size=8, width=0.25)


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits", train_limit=200, validation=50)


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    model = small(seed=1)
    train(model, digits, Recipe(epochs=3, batch_size=50, lr=0.05), device="cpu")
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_the_objective_is_that_of_a_loop_by_hand(digits, teacher) -> None:
    recipe = Recipe(epochs=2, batch_size=50, lr=0.05, schedule="constant")
    model, hand = small(), small().train()
    rows = train(model, digits, recipe, callbacks=[taught(teacher)], device="cpu").rows
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses: list[float] = []
    for epoch in (1, 2):
        feed = data.batches(
            digits.train, 50, shuffle=True, augment=digits.augment, seed=0, epoch=epoch, device="cpu", drop_last=True
        )
        for images, labels in feed:
            optimizer.zero_grad()
            logits = hand(images)
            with torch.no_grad():
                wanted = teacher.eval()(images)
            task = functional.cross_entropy(logits, labels)
            said, wanted = (functional.log_softmax(value / 3, dim=1) for value in (logits, wanted))
            divergence = functional.kl_div(said, wanted, reduction="batchmean", log_target=True)
            (0.3 * task + 0.7 * 9 * divergence).backward()
            optimizer.step()
            losses.append(task.item())
    for one, two in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert [row["train_loss"] for row in rows] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-3)
    assert [row["extra_macs"] for row in rows] == [measure(teacher, digits.example).macs] * 2


def taught(teacher: nn.Module, **options: Any) -> Any:
    return DistillationCallback(Distillation(teacher, temperature=3.0, weight=0.7, **options))


@pytest.mark.parametrize("options", [{}, {"channels_last": True}])
def test_resumed_after_any_epoch_with_everything_at_once(digits, teacher, tmp_path: Path, options) -> None:
    recipe = Recipe(
        epochs=4, batch_size=50, lr=0.003, optimizer="adamw", schedule="warmup-cosine", warmup=0.1, ema=0.95, clip=1.0,
        head_lr=2.0, label_smoothing=0.1, **options,
    )  # fmt: skip

    def run(
        check_: Any = None, path: Path | None = None
    ) -> tuple[nn.Module, Any, OnlineCallback, DistillationCallback]:
        model, online = small(), OnlineCallback(keep=0.5, schedule="0.1,0.3,0.6", strength=0.1)
        teaching = Distillation(teacher, features=["features.1"], example_inputs=digits.example, student=model)
        callbacks: Any = [online, following := DistillationCallback(teaching, online)]
        rows = train(model, digits, recipe, callbacks=callbacks, checkpoint=path, check=check_, device="cpu").rows
        return model, [{**row, "seconds": 0} for row in rows], online, following

    def stop(_seconds: float) -> None:
        raise InterruptedError

    model, rows, online, following = run()
    assert online.online is not None
    assert [row["events"] != [] for row in rows] == [True, True, True, False]
    assert following.distillation.followed == len(online.online.plans) == 3
    for _ in range(3):
        with pytest.raises(InterruptedError):
            run(stop, tmp_path / "state")
    again, found, *_ = run(path=tmp_path / "state")
    assert same(model, again)
    assert found == rows


def test_another_teacher_is_refused(digits, teacher, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=50)
    train(small(), digits, recipe, callbacks=[taught(teacher)], checkpoint=tmp_path / "state", device="cpu")
    for other in (taught(small()), DistillationCallback(Distillation(teacher, weight=0.7))):
        with pytest.raises(CheckpointError, match="written with another teacher"):
            train(small(), digits, recipe, callbacks=[other], checkpoint=tmp_path / "state", device="cpu")  # type: ignore[list-item]


RECIPE = {"epochs": 2, "batch_size": 50, "lr": 0.05}
OPTIONS = {"train_limit": 200, "validation": 0}


def setting(**options: Any) -> Setting:
    return Setting("vgg_small", "digits", width=0.25, data_options=OPTIONS, recipe=RECIPE, retrain_epochs=1, **options)


def test_trials_have_the_teacher_that_they_say_and_pay_for_it(teacher, tmp_path: Path) -> None:
    save(teacher, tmp_path / "teacher.safetensors")
    file = str(tmp_path / "teacher.safetensors")
    from_fresh, with_file = setting(), setting(distill={"teacher": file, "weight": 0.9})
    tuned = setting(weights=file, start={"tune": True}, distill={"weight": 0.9})
    wanted = [
        ("l1+distill", from_fresh, "before the cut", [0, 0, 1]),
        ("l1+distill", with_file, "file", [0, 0, 1]),
        ("online+distill", from_fresh, "before the first cut", [0, 1]),
        ("online+distill", with_file, "file", [1, 1]),
        ("online+distill", tuned, "at the start", [1, 1]),
        ("scratch+distill", with_file, "file", [1, 1]),
    ]
    top: set[float] = set()
    for number, (method, chosen, who, taught_in) in enumerate(wanted):
        trial = Trial(method, 0, chosen, keep=0.5)
        assert trial.teacher == who
        bench = RunContext(chosen, tmp_path / str(number), "cpu")
        check([trial], bench)
        record = run_trial(trial, bench)
        assert record["result"] is not None
        assert record["dense"] is not None
        history, full = record["history"], record["dense"]["macs"]
        assert [row.get("extra_macs", 0) for row in history] == [full * part for part in taught_in]
        student = [row["macs"] for row in history]
        if method.startswith("online"):
            student = [full, *student[:-1]]
        assert record["result"]["train_macs"] == 200 * (3 * sum(student) + full * sum(taught_in))
        top.add(history[-1]["train_loss"])
    assert len(top) == len(wanted)


def test_the_name_of_a_trial_without_a_teacher_is_what_it_was() -> None:
    assert "distill" not in Trial("l1", 0, setting()).options
    assert "distill" not in Trial("l1+distill", 0, setting()).options
    with_weight = Trial("l1+distill", 0, setting(distill={"weight": 0.3}))
    assert with_weight.options["distill"] == {"weight": 0.3}
    assert Trial.from_dict(with_weight.to_dict()) == with_weight
    assert Trial("online+distill", 0, setting(), keep=0.5).online_options["distill"] == 0.3


def test_longer_pays_for_the_teacher(teacher, tmp_path: Path) -> None:
    save(teacher, tmp_path / "teacher.safetensors")
    chosen = setting(distill={"teacher": str(tmp_path / "teacher.safetensors")})
    chosen = replace(chosen, recipe={**RECIPE, "epochs": 30}, online={"schedule": "0.2"})
    bench = RunContext(chosen, tmp_path, "cpu")
    full = measure(bench.build(), bench.example).macs
    for plain, length in (("online+longer", 35), ("scratch+longer", 42)):  # half of the MACs from a fifth of it on
        assert paid_epochs(Trial(plain, 0, chosen, macs=0.5), bench) == {"epochs": length}
        trial = Trial(f"{plain}+distill", 0, chosen, macs=0.5)
        epochs = paid_epochs(trial, bench)["epochs"]
        share = (0.2 + 0.8 * 0.5 if "online" in plain else 0.5) + 1 / 3  # a forward pass of three
        assert epochs == int(LONGER * 30 * full / (share * full))


def test_teachers_that_can_not_be(teacher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --teacher FILE"):
        Trial("scratch+distill", 0, setting(), keep=0.5)
    for method in ("dense+distill", "l1+longer", "scratch-long+distill"):
        with pytest.raises(ConfigError, match="only online methods take"):
            Trial(method, 0, setting())
    save(teacher, tmp_path / "teacher.safetensors")
    named = {"teacher": str(tmp_path / "teacher.safetensors"), "fingerprint": "0" * 16}
    for distill, error, message in (
        (named, RecordError, "not the weights that this was begun with"),
        ({"weight": 1.5}, ConfigError, "weight=1.5"),
        ({"temperature": 0}, ConfigError, "temperature=0"),
    ):
        chosen = setting(distill=distill)
        with pytest.raises(error, match=message):
            check([Trial("l1+distill", 0, chosen, keep=0.5)], RunContext(chosen, tmp_path, "cpu"))
    assert Weights.read(named["teacher"]).fingerprint != named["fingerprint"]
