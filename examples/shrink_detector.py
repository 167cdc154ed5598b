"""A detector with a list of outputs and two smaller ones, with the large one as teacher on every level of the list.

A small network in the manner of YOLO (two levels; at each place whether a centre lies there, the box, the class) learns
to find discs and squares in noise, and is then shrunk to 80 % and 50 % of its work, in the lines between the rules.
Runs in about a minute on one core.

    python examples/shrink_detector.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import filterfold as ff

STRIDES, KINDS = (4, 8), 2


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class Detector(nn.Module):
    """Images `(b, 3, size, size)` → one map for each stride: `(b, 1 + 4 + KINDS, size / stride, size / stride)`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, width, 2), block(width, 2 * width, 2))
        self.fine, self.coarse = block(2 * width, 2 * width), block(2 * width, 4 * width, 2)
        self.lateral = nn.Conv2d(4 * width, 2 * width, 1)
        self.heads = nn.ModuleList(
            nn.Sequential(block(channels, 2 * width), nn.Conv2d(2 * width, 5 + KINDS, 1))
            for channels in (4 * width, 4 * width)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """The two maps, fine first."""
        low = self.fine(self.stem(images))
        high = self.coarse(low)
        merged = torch.cat((low, functional.interpolate(self.lateral(high), scale_factor=2.0)), 1)
        return [head(features) for head, features in zip(self.heads, (merged, high), strict=True)]


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Images with one small and one large thing each, and what the detector should return for them."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.randn(count, 3, size, size, generator=draw)
    wanted = [torch.zeros(count, 5 + KINDS, size // stride, size // stride) for stride in STRIDES]
    places = torch.arange(size)
    for index, image in enumerate(images):
        for level, stride in zip(wanted, STRIDES, strict=True):  # small things at the fine level, large at the coarse
            half = stride * (0.8 + 0.4 * torch.rand(1, generator=draw).item())
            row, column = (half + torch.rand(2, generator=draw) * (size - 2 * half)).tolist()
            kind = int(torch.randint(KINDS, (1,), generator=draw))
            down, right = (places[:, None] - row).abs(), (places - column).abs()
            inside = down**2 + right**2 < half**2 if kind == 0 else (down < half) & (right < half)
            image[:, inside] += torch.rand(3, 1, generator=draw) + 0.5
            box = [row / stride % 1, column / stride % 1, half / stride, half / stride]
            level[index, :, int(row / stride), int(column / stride)] = torch.tensor(
                [1.0, *box, *(float(kind == k) for k in range(KINDS))]
            )
    return images, wanted


def task(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Whether a centre lies there, everywhere; box and class where one does."""
    total = torch.zeros(())
    for level, target in zip(found, wanted, strict=True):
        here = target[:, 0] > 0
        rare = torch.tensor(float(here.numel() / max(1, int(here.sum()))) ** 0.5)
        total = total + functional.binary_cross_entropy_with_logits(level[:, 0], target[:, 0], pos_weight=rare)
        level, target = level.movedim(1, 3)[here], target.movedim(1, 3)[here]
        total = total + functional.mse_loss(level[:, 1:5], target[:, 1:5])
        total = total + functional.cross_entropy(level[:, 5:], target[:, 5:])
    return total


def hits(network: nn.Module, images: Tensor, wanted: list[Tensor]) -> float:
    """Percent of the things of which the likeliest place at their level is theirs, with the right class."""
    with torch.inference_mode():
        found = network.eval()(images)
    right = []
    for level, target in zip(found, wanted, strict=True):
        level, target = level.flatten(2), target.flatten(2)
        place, true = level[:, 0].argmax(1), target[:, 0].argmax(1)
        rows = torch.arange(len(level))
        right.append((place == true) & (level[rows, 5:, place].argmax(1) == target[rows, 5:, true].argmax(1)))
    return 100 * torch.cat(right).float().mean().item()


# --8<-- [start:main]
def main(epochs: int = 21, images: int = 768, size: int = 32) -> dict[str, tuple[int, float]]:
    """Train, shrink, print what happens; returns name → (multiply-accumulates, things found in percent)."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = scenes(images, size, seed=0), scenes(images // 4, size, seed=1)
    model = Detector()
    folder = Path(tempfile.mkdtemp())

    def learn(network: nn.Module, epochs: int, teacher: ff.Distillation | None = None) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3 if teacher is None else 1e-3)
        for _ in range(epochs):
            network.train()
            for batch in torch.randperm(len(x)).split(32):
                outputs = network(x[batch])
                loss = task(outputs, [level[batch] for level in y])
                if teacher is not None:
                    loss = teacher(x[batch], outputs, task=loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def tune(child: ff.Child) -> None:
        learn(child.network, epochs // 3, child.distillation)

    learn(model, epochs)
    found = {"uncut": (ff.measure(model, x[:1]).macs, hits(model, x_test, y_test))}
    # ------------------------------------------------------------------------------------------------------------------
    teacher = ff.Distillation(model, losses="mse")  # the mean over the levels of the list
    family = ff.shrink(model, x[:1], macs=[0.8, 0.5], calibration=x.split(64), distillation=teacher, train=tune)
    for child in family:
        ff.save(child.network, folder / f"{child.share}.safetensors", plan=child.plan)
        found[str(child.share)] = child.cost.macs, hits(child.network, x_test, y_test)
    # ------------------------------------------------------------------------------------------------------------------
    for name, (macs, share) in found.items():
        print(f"{name:>5}: {macs / 1e6:6.1f} M multiply-accumulates, {share:.1f} % of the things found")
    return found


# --8<-- [end:main]


if __name__ == "__main__":
    main()
