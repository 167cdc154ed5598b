"""A cut network learns from the uncut one, in a training loop of your own: three lines, marked (1) to (3).

Trains a small convolutional network on scikit-learn's handwritten digits, cuts it to a quarter of its work, and trains
the small one on, with the large one as its teacher: its answers, and the feature map of its second block, of which the
plan knows which channels are left.

    python examples/distillation.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import filterfold as ff


def main(epochs: int = 6) -> tuple[float, float]:
    """Train, print what happens, return the test accuracy right after the cut and at the end, in percent."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4, 10)),
    )

    def accuracy() -> float:
        model.eval()
        with torch.inference_mode():
            right = model(images[test]).argmax(dim=1) == labels[test]
        return 100 * right.float().mean().item()

    def learn(lr: float, distillation: ff.Distillation | None = None) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            model.train()
            for batch in torch.tensor(train)[torch.randperm(len(train))].split(64):
                outputs = model(images[batch])
                loss: Tensor = functional.cross_entropy(outputs, labels[batch])
                if distillation is not None:
                    loss = distillation(images[batch], outputs, task=loss)  # (3)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    learn(lr=0.05)
    print(f"uncut: test accuracy {accuracy():.1f} %")
    distillation = ff.Distillation(model, weight=0.7, features=["6"], example_inputs=images[:1])  # (1)
    result = ff.prune(model, images[:1], macs=0.25)
    distillation.follow(result.plan)  # (2)
    before = accuracy()
    learn(lr=0.01, distillation=distillation)
    print(f"{result.before.macs / result.after.macs:.1f}x fewer multiply-accumulates: {before:.1f} % at once, ", end="")
    print(f"{accuracy():.1f} % after {epochs} epochs with the uncut network as teacher")
    return before, accuracy()


if __name__ == "__main__":
    main()
