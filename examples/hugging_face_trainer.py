"""Online clustering in Hugging Face's Trainer: one callback.

Trains a small convolutional network on scikit-learn's handwritten digits, until half of its work is left. Needs
`pip install transformers accelerate`. A network of your own must take and give what the Trainer expects, as here; the
library's vision models do so already.

    python examples/hugging_face_trainer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, random_split
from transformers import Trainer, TrainingArguments, set_seed

from filterfold import zoo
from filterfold.online.huggingface import HuggingFaceCallback


class Classifier(nn.Module):
    """Takes `pixel_values` and `labels`, gives `loss` and `logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss if there are labels."""
        logits = self.network(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": functional.cross_entropy(logits, labels), "logits": logits}
        )


class Digits(Dataset):
    """Images and labels by the names that the network's `forward` has for them."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


# --8<-- [start:main]
def main(epochs: int = 6) -> float:
    """Train, print what happened, return the test accuracy in percent."""
    set_seed(0)
    data = Digits()
    train, test = random_split(data, [0.8, 0.2])
    model = Classifier()
    shrink = HuggingFaceCallback({"pixel_values": data.images[:1]}, macs=0.5, schedule="gradual")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=512,
            learning_rate=3e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, callbacks=[shrink])
        trainer.train()
        found = trainer.predict(test)

    accuracy = 100 * float((found.predictions.argmax(axis=1) == found.label_ids).mean())
    for cut in shrink.online.cuts:
        print(cut)
    work = shrink.online.cuts[-1].macs[1] / shrink.online.cuts[0].macs[0]
    print(f"test accuracy {accuracy:.1f} %, {work:.2f} of the work")
    return accuracy


# --8<-- [end:main]


if __name__ == "__main__":
    main()
