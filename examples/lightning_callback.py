"""Online clustering in Lightning's Trainer: one callback.

Trains a small convolutional network on scikit-learn's handwritten digits, until half of its work is left. Needs
`pip install lightning`.

    python examples/lightning_callback.py
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from filterfold import zoo
from filterfold.online.lightning import LightningCallback


class Classifier(L.LightningModule):
    """Nothing in it knows that its network shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.network = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The loss of a batch."""
        loss = functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Note the accuracy."""
        right = self.network(batch[0]).argmax(dim=1) == batch[1]
        self.log("accuracy", 100 * right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


# --8<-- [start:main]
def main(epochs: int = 6) -> float:
    """Train, print what happened, return the test accuracy in percent."""
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, test = random_split(TensorDataset(images, labels), [0.8, 0.2])

    module = Classifier()
    shrink = LightningCallback(network="network", macs=0.5, schedule="gradual")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[shrink], **quiet)
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    accuracy = trainer.test(module, DataLoader(test, batch_size=512), verbose=False)[0]["accuracy"]

    for cut in shrink.online.cuts:
        print(cut)
    work = shrink.online.cuts[-1].macs[1] / shrink.online.cuts[0].macs[0]
    print(f"test accuracy {accuracy:.1f} %, {work:.2f} of the work")
    return accuracy


# --8<-- [end:main]


if __name__ == "__main__":
    main()
