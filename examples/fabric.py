"""Online clustering with Lightning Fabric, which brings device and precision: the lines marked (1) to (3).

Trains a small convolutional network on scikit-learn's handwritten digits, until half of its work is left.

    python examples/fabric.py
"""

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from filterfold import OnlineFilterClustering, Schedule, zoo


# --8<-- [start:main]
def main(epochs: int = 6) -> float:
    """Train, print what happens, return the test accuracy in percent."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, test = random_split(TensorDataset(images, labels), [0.8, 0.2])
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=64, shuffle=True))

    network = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)
    inner = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    model, optimizer = fabric.setup(network, inner)
    online = OnlineFilterClustering(  # (1): the network and its optimizer, not Fabric's wrappers
        network, images[:1].to(fabric.device), inner, macs=0.5, schedule=Schedule.gradual(epochs)
    )
    for epoch in range(1, epochs + 1):
        model.train()
        for x, y in loader:
            loss = functional.cross_entropy(model(x), y) + online.loss()  # (2)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}  {'; '.join(online.step(epoch))}")  # (3)

    model.eval()
    with torch.inference_mode():
        right = [model(x.to(fabric.device)).argmax(1).cpu() == y for x, y in DataLoader(test, batch_size=512)]
    accuracy = 100 * torch.cat(right).float().mean().item()
    print(f"test accuracy {accuracy:.1f} %, {online.cuts[-1].macs[1] / online.cuts[0].macs[0]:.2f} of the work")
    return accuracy


# --8<-- [end:main]


if __name__ == "__main__":
    main()
