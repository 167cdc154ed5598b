"""A classifier of timm on a folder of your own images: cut when the fine-tuning begins, then trained.

The folder has `train/` and `test/` with one folder a class. Without one, small images in two colours are drawn, and a
tiny network starts from fresh weights, so that the script runs offline, in seconds.

    pip install 'filterfold[zoo]' && python examples/image_folder.py [FOLDER [NAME]]
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import filterfold as ff


def drawn(folder: Path, count: int) -> Path:
    """A folder of images: noise in warm and in cold colours."""
    draw = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for kind, colour in {"warm": (0.8, 0.4, 0.2), "cold": (0.2, 0.4, 0.8)}.items():
            (folder / split / kind).mkdir(parents=True)
            for index in range(count):
                pixels = torch.tensor(colour) + 0.2 * torch.randn(32, 32, 3, generator=draw)
                image = Image.fromarray((255 * pixels.clamp(0, 1)).byte().numpy())
                image.save(folder / split / kind / f"{index}.png")
    return folder


# --8<-- [start:main]
def main(folder: str | None = None, name: str = "resnet50", epochs: int = 3) -> float:
    """Cut, repair, train, save; returns the test accuracy in percent."""
    torch.manual_seed(0)
    if folder is None:
        place, name, size = drawn(Path(tempfile.mkdtemp()), count=64), "test_resnet", 32
    else:
        place, size = Path(folder), 224

    classes = len(ImageFolder(place / "train").classes)
    model = timm.create_model(name, pretrained=folder is not None, num_classes=classes)
    expected = resolve_model_data_config(model) | {"input_size": (3, size, size)}  # how its weights saw images
    train = ImageFolder(place / "train", create_transform(**expected, is_training=True))
    test = ImageFolder(place / "test", create_transform(**expected))
    loader = DataLoader(train, batch_size=32, shuffle=True)
    calibration = [images for images, _ in loader][:8]

    (child,) = ff.shrink(
        model, calibration[0][:1], macs=[0.5], calibration=calibration, criterion="reconstruction-then-train"
    )
    print(child)
    small = child.network
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(loader))
    for epoch in range(1, epochs + 1):
        small.train()
        for images, labels in loader:
            loss = functional.cross_entropy(small(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")

    small.eval()
    with torch.inference_mode():
        right = torch.cat([small(images).argmax(1) == labels for images, labels in DataLoader(test, batch_size=64)])
    ff.save(small, place / "small.safetensors", plan=child.plan, metadata={"classes": train.classes})
    print(f"test accuracy {100 * right.float().mean():.1f} %; saved as {place / 'small.safetensors'}")
    return 100 * right.float().mean().item()


# --8<-- [end:main]


if __name__ == "__main__":
    main(*sys.argv[1:])
