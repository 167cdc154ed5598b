"""Lightning's Trainer under DDP, cut while it trains: runs in two processes, and asserts by itself."""

# ruff: noqa: E402
from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parent)]
from conformance.torchvision_shim import declare_missing_operators

declare_missing_operators()  # as tests/conftest.py does, since Lightning imports torchvision

from lightning.pytorch import Callback, LightningModule, Trainer
from plain_ddp import flat, same_everywhere
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from filterfold import data, zoo
from filterfold.online import Schedule
from filterfold.online.lightning import LightningCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Check(Callback):
    """DDP's gradients are the means of those that every process computes by itself, before the cut and after."""

    def __init__(self) -> None:
        self.alone: nn.Module | None = None
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        self.alone = copy.deepcopy(module.net)
        cross_entropy(self.alone(batch[0]), batch[1]).backward()

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        expected = flat(parameter.grad for parameter in self.alone.parameters())  # type: ignore[union-attr]
        dist.all_reduce(expected)
        found = flat(parameter.grad for parameter in module.net.parameters())
        torch.testing.assert_close(found, expected / 2, rtol=1e-4, atol=1e-5)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        assert same_everywhere(flat(module.net.parameters()))
        self.sizes.append(module.net.features[0].out_channels)


def fit(schedule: Schedule, checkpoint: str | None = None, epochs: int = 3) -> Any:
    digits = data.load("digits", train_limit=160).train
    loader = DataLoader(TensorDataset(digits.images.float() / 16, digits.labels), batch_size=20, shuffle=True)
    callback, check, module = LightningCallback(network="net", keep=0.5, schedule=schedule), Check(), Classifier()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback, check],
        enable_checkpointing=False, **quiet,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer, module, callback, check


if __name__ == "__main__":
    steps = Schedule(updates=(2, 6), milestones=((4, 0.5), (7, 1.0)), unit="step")
    trainer, module, callback, check = fit(steps)
    assert check.sizes == [16] * 3 + [12] * 3 + [8] * 6, check.sizes
    trainer.save_checkpoint(sys.argv[1])
    trainer, again, callback, check = fit(steps, checkpoint=sys.argv[1], epochs=4)
    assert check.sizes == [8] * 4
    assert len(callback.online.plans) == 2

    trainer, module, callback, check = fit(Schedule(updates=(1,), milestones=((2, 1.0),)))
    assert check.sizes == [16] * 8 + [8] * 4, check.sizes
