"""Online clustering in a training loop of your own: three lines, marked (1) to (3).

Trains a small convolutional network on scikit-learn's handwritten digits. On the way its filters are grouped by
direction, pulled together, and folded at milestones, until half of them are left; the optimizer goes on.

    python examples/online_plain_pytorch.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from filterfold.online import OnlineFilterClustering, Schedule


# --8<-- [start:main]
def main(epochs: int = 12) -> float:
    """Train, print what happens, return the test accuracy in percent."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    online = OnlineFilterClustering(  # (1)
        model, images[:1], optimizer, keep=0.5, schedule=Schedule.gradual(epochs)
    )

    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.tensor(train)[torch.randperm(len(train))].split(64):
            loss = functional.cross_entropy(model(images[batch]), labels[batch]) + online.loss()  # (2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        events = online.step(epoch)  # (3)
        print(f"epoch {epoch:2d}  loss {loss.item():.3f}  {'; '.join(events)}")

    model.eval()
    with torch.inference_mode():
        right = model(images[test]).argmax(dim=1) == labels[test]
    accuracy = 100 * right.float().mean().item()
    before, after = online.cuts[0].macs[0], online.cuts[-1].macs[1]
    print(f"test accuracy {accuracy:.1f} %, {before / after:.1f}x fewer multiply-accumulates than at the start")
    print(model)
    return accuracy


# --8<-- [end:main]


if __name__ == "__main__":
    main()
