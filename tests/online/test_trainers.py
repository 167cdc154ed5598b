"""Online clustering in other people's training loops: the examples run, and the adapters do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from filterfold.errors import CheckpointError, ConfigError
from filterfold.online import OnlineFilterClustering, Pull, Schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's own code
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
]


def example(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("own_loop", "sklearn"),
        ("timm_training_script", "timm"),
        ("fabric", "lightning_fabric"),
        ("lightning_callback", "lightning"),
        ("hugging_face_trainer", "transformers"),
    ],
)
@pytest.mark.slow
def test_the_example_runs(name: str, needs: str, capsys) -> None:
    pytest.importorskip(needs)
    assert example(name).main() > 93
    shown = capsys.readouterr().out
    assert "units, 0." in shown
    assert float(shown.split()[-4]) <= 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ultralytics' own
def test_the_detector_of_another_trainer_shrinks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    pytest.importorskip("ultralytics")
    assert 0.5 < example("ultralytics_callback").main() <= 0.6
    assert capsys.readouterr().out.count(": fold: ") > 1


def classifier() -> Any:
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten())
            self.head = nn.Linear(12 * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    return Classifier()


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.mean((1, 2, 3)).mul(20).long().clamp(-1, 1) + 1), batch_size=8)


def fit(module: Any, callback: Any, epochs: int, path: Path, **options: Any) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, keep],
    )
    trainer.fit(module, batches(), **options)


def shrinking(**options: Any) -> Any:
    from filterfold.online.lightning import LightningCallback

    schedule = Schedule((1, 2, 3), ((2, 0.5), (4, 1.0)))
    options = {"keep": 0.5, "schedule": schedule, "strength": 0.3, "example_inputs": torch.zeros(1, 1, 4, 4), **options}
    return LightningCallback(**options)


BY_EPOCH = Schedule((1, 2, 3), ((2, 0.5), (4, 1.0)))


@pytest.mark.parametrize("schedule", [BY_EPOCH, Schedule((2, 4, 6), ((4, 0.5), (11, 1.0)), unit="step")])
def test_lightning_goes_on_from_the_checkpoint_of_a_smaller_network(tmp_path, schedule: Schedule) -> None:
    pytest.importorskip("lightning")
    whole, first = classifier(), shrinking(schedule=schedule)
    fit(whole, first, 6, tmp_path / "whole")
    assert whole.body[0].out_channels == 6
    assert len(first.online.cuts) == 2
    assert {row["epoch"] for row in first.online.history} == {*schedule.updates, *dict(schedule.milestones)}
    for epoch in (0, 2):  # the second one is of a network that is cut already
        again, second = classifier(), shrinking(schedule=schedule)
        fit(again, second, 6, tmp_path / "whole", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert second.online.plans == first.online.plans
        assert second.online.history == first.online.history
        assert all(
            torch.equal(one, two)
            for one, two in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("pull", ["cosine", "centripetal"])
def test_lightning_pulls(tmp_path, pull: str) -> None:
    pytest.importorskip("lightning")
    changes = []
    for strength in (0.0, 3.0 if pull == "cosine" else 30.0):
        callback = shrinking(pull=pull, strength=strength, schedule=Schedule((1,), ((29, 1.0),)))
        fit(classifier(), callback, 30, tmp_path)
        changes.append(callback.online.cuts[0].change)
    assert changes[1] < 0.5 * changes[0]


def test_lightning_levels_off_and_refuses(tmp_path) -> None:
    pytest.importorskip("lightning")
    schedule = Schedule((), ((9, 1.0),), patience=1, change=0.99)
    callback = shrinking(schedule=schedule, monitor="loss")
    fit(classifier(), callback, 3, tmp_path)
    assert callback.online.finished
    fit(classifier(), callback := shrinking(schedule="0.3,0.5"), 2, tmp_path)
    assert callback.online.schedule.milestones == ((2, 0.5), (3, 1.0))  # of six batches
    with pytest.raises(ConfigError, match="metric=loss"):
        fit(classifier(), shrinking(schedule=schedule, monitor="none"), 3, tmp_path)
    with pytest.raises(ConfigError, match="example_input_array"):
        fit(classifier(), shrinking(example_inputs=None), 1, tmp_path)
    strategy = SimpleNamespace(model=nn.Linear(1, 1))  # one that deals out each layer, such as FSDP
    trainer = SimpleNamespace(optimizers=[None], world_size=2, strategy=strategy)
    with pytest.raises(ConfigError, match="not SimpleNamespace: strategy='ddp'"):
        shrinking().on_train_start(trainer, classifier())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [BY_EPOCH, Schedule((3, 6, 9), ((7, 0.5), (17, 1.0)), unit="step")])
def test_hugging_face_goes_on_from_the_checkpoint_of_a_smaller_network(tmp_path, schedule: Schedule) -> None:
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments, set_seed

    from filterfold.online.huggingface import HuggingFaceCallback

    module = example("hugging_face_trainer")
    data = torch.utils.data.Subset(module.Digits(), range(80))
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=5, per_device_train_batch_size=16, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="epoch", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def run(checkpoint: Path | None, *, resized: bool = True) -> tuple[Any, Any]:
        set_seed(0)
        model = module.Classifier()
        callback = HuggingFaceCallback(
            {"pixel_values": torch.zeros(1, 1, 8, 8)},
            keep=0.5,
            schedule=schedule,
            strength=0.3,
        )
        if checkpoint is not None and resized:
            callback.resume(model, checkpoint)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model, callback.online

    whole, first = run(None)
    assert len(first.cuts) == 2
    for step in (5, 15):  # after one epoch, and after three: the network is cut already
        again, second = run(tmp_path / f"checkpoint-{step}")
        assert second.plans == first.plans
        assert second.history == first.history
        weights = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in weights)
    with pytest.raises(ConfigError, match=r"call resume\(model, checkpoint\)"):
        run(tmp_path / "checkpoint-5", resized=False)
    with pytest.raises(CheckpointError, match="no such file"):
        run(tmp_path)


@pytest.mark.slow
def test_hugging_face_levels_off_and_refuses(tmp_path) -> None:
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from filterfold.online.huggingface import HuggingFaceCallback

    module = example("hugging_face_trainer")
    data = torch.utils.data.Subset(module.Digits(), range(64))
    inputs = {"pixel_values": torch.zeros(1, 1, 8, 8)}

    def run(callback: Any, **options: Any) -> None:
        plain = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        plain |= {"dataloader_pin_memory": False, "num_train_epochs": 3, "logging_steps": 1}
        arguments = TrainingArguments(str(tmp_path), **{**plain, **options})
        Trainer(module.Classifier(), arguments, train_dataset=data, callbacks=[callback]).train()

    callback = HuggingFaceCallback(inputs, keep=0.5, schedule=Schedule((1,), ((9, 1.0),), patience=1, change=0.99))
    run(callback)
    assert callback.online is not None
    assert callback.online.finished
    assert callback.online.labels == {}
    run(callback := HuggingFaceCallback(inputs, keep=0.5, schedule="0.25,0.5"))
    assert callback.online is not None
    assert callback.online.schedule == Schedule.at_fractions([(0.25, 0.5), (0.5, 1.0)], steps=24)
    with pytest.raises(ConfigError, match="metric=loss"):
        run(HuggingFaceCallback(inputs, keep=0.5, schedule="plateau", monitor="none"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_gradients_added_by_hand_are_those_of_the_loss(layout: torch.memory_format, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 1), nn.ReLU()),  # its filters lie along axis 1
        *(nn.Conv2d(8, 8, 2, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    )
    with torch.no_grad():
        model[0].weight[3] = 0  # has no direction
    model = model.to(precision, memory_format=layout)
    images = torch.ones(2, 1, 4, 4, dtype=precision)
    online = OnlineFilterClustering(model, images[:1], keep=0.5, pull=Pull(strength=0.7))
    online.add_gradients()  # nothing yet
    assert model[0].weight.grad is None
    online.update_clusters()
    (model(images).mean() + online.loss()).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(images).mean().backward()
    online.add_gradients()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
