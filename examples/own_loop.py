"""Shrinking in a loop with AdamW, a moving average of the weights, and mixed precision; cuts fall between batches.

Trains a small convolutional network on scikit-learn's handwritten digits, until 40 % of its work is left. What differs
from a loop without cuts is marked (1) to (3).

    python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from filterfold import OnlineFilterClustering, Schedule, zoo


# --8<-- [start:main]
def main(epochs: int = 8, device: str = "cpu") -> float:
    """Train, print what happens, return the test accuracy of the averaged weights in percent."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 16
    labels = torch.tensor(digits.target, device=device)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)

    model = zoo.build("vgg_small", channels=1, image_size=8, width=0.5).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    steps = epochs * -(-len(train) // 64)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    online = OnlineFilterClustering(  # (1)
        model, images[:1], optimizer, macs=0.4, averaged=ema, schedule=Schedule.small_cuts(steps, every=20, end=0.5)
    )

    step = 0
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.tensor(train)[torch.randperm(len(train))].split(64):
            with torch.autocast(device, torch.bfloat16):
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
            loss = loss + online.loss()  # (2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            ema.update_parameters(model)
            step += 1
            online.step(step)  # (3)
        print(f"epoch {epoch}  loss {loss.item():.3f}  {online.cuts[-1]}")

    ema.eval()
    with torch.inference_mode():
        right = ema(images[test]).argmax(dim=1) == labels[test]
    accuracy = 100 * right.float().mean().item()
    print(f"test accuracy {accuracy:.1f} %, {online.cuts[-1].macs[1] / online.cuts[0].macs[0]:.2f} of the work")
    return accuracy


# --8<-- [end:main]


if __name__ == "__main__":
    main()
