"""A segmentation network and two smaller ones, with the large one as teacher on the logit map.

A U-Net of segmentation_models_pytorch learns to outline discs and squares in noise, and is then shrunk to 80 % and 50 %
of its work, in the lines between the rules. Runs in about a minute on one core.

    pip install 'filterfold[examples]' && python examples/shrink_segmentation.py
"""

import tempfile
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional

import filterfold as ff

CLASSES = ("background", "disc", "square")


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images `(count, 3, size, size)` with a disc and a square each, and the class of every pixel."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.randn(count, 3, size, size, generator=draw)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    places = torch.arange(size)
    for image, label in zip(images, labels, strict=True):
        for kind in (1, 2):
            (row, column), half = (torch.rand(2, generator=draw) * size).tolist(), size / 6
            down, right = (places[:, None] - row).abs(), (places - column).abs()
            inside = down**2 + right**2 < half**2 if kind == 1 else (down < half) & (right < half)
            image[:, inside] += torch.rand(3, 1, generator=draw) + 0.5
            label[inside] = kind
    return images, labels


def overlap(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes, in percent."""
    with torch.inference_mode():
        told = network.eval()(images).argmax(1)
    shares = [((told == c) & (labels == c)).sum() / ((told == c) | (labels == c)).sum() for c in range(len(CLASSES))]
    return 100 * torch.stack(shares).mean().item()


# --8<-- [start:main]
def main(epochs: int = 12, images: int = 256, size: int = 32) -> dict[str, tuple[int, float]]:
    """Train, shrink, print what happens; returns name → (multiply-accumulates, mean IoU in percent)."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = scenes(images, size, seed=0), scenes(images // 4, size, seed=1)
    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 16), classes=3)
    folder = Path(tempfile.mkdtemp())

    def learn(network: nn.Module, epochs: int, teacher: ff.Distillation | None = None) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3 if teacher is None else 1e-3)
        for _ in range(epochs):
            network.train()
            for batch in torch.randperm(len(x)).split(32):
                logits = network(x[batch])
                loss = functional.cross_entropy(logits, y[batch])
                if teacher is not None:
                    loss = teacher(x[batch], logits, task=loss)  # half of it: as the uncut network, at every pixel
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def tune(child: ff.Child) -> None:
        learn(child.network, epochs // 3, child.distillation)

    learn(model, epochs)
    found = {"uncut": (ff.measure(model, x[:1]).macs, overlap(model, x_test, y_test))}
    # ------------------------------------------------------------------------------------------------------------------
    teacher = ff.Distillation(model)
    family = ff.shrink(model, x[:1], macs=[0.8, 0.5], calibration=x.split(64), distillation=teacher, train=tune)
    for child in family:
        ff.save(child.network, folder / f"{child.share}.safetensors", plan=child.plan)
        found[str(child.share)] = child.cost.macs, overlap(child.network, x_test, y_test)
    # ------------------------------------------------------------------------------------------------------------------
    for name, (macs, iou) in found.items():
        print(f"{name:>5}: {macs / 1e6:6.1f} M multiply-accumulates, mean IoU {iou:.1f} %")
    return found


# --8<-- [end:main]


if __name__ == "__main__":
    main()
