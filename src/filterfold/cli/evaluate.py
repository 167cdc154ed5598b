"""`filterfold evaluate`: the accuracy of a network with given weights on the test images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from .display import count, live, table
from .families import DataOptions, Device, ModelOptions, Precision, Threads, use_threads
from .networks import WEIGHTS_HELP, with_weights

EXAMPLES = """
Examples:

  filterfold evaluate --model resnet56 --weights resnet56-cifar10.safetensors --data cifar10 --normalization imagenet

  filterfold evaluate --model vgg16 --weights pruned.safetensors --data cifar10
"""


def evaluate(
    chosen: ModelOptions,
    images: DataOptions,
    weights: Annotated[Path, Option("--weights", "-w", help=WEIGHTS_HELP)],
    batch_size: Annotated[int, Option(help="Images at a time; changes speed and memory only.", min=1)] = 500,
    precision: Precision = "32-true",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Evaluate a network on the test images: top-1, top-5, loss, cost."""
    import torch

    from ..cost import measure
    from ..experiment.bench import resolve
    from ..training import evaluate as run

    use_threads(threads)
    device = resolve(device)
    with live():
        data = images.load()
        model = with_weights(lambda: chosen.build(data), weights, device)
        size = data.image_size
        cost = measure(model, torch.zeros(1, data.channels, size, size, device=device))
        found = run(
            model, data.test, batch_size=batch_size, device=device, precision=precision, classes=len(data.classes)
        )
    rows = [
        ("top-1", f"{found.top1:.2f} %"),
        ("top-5", f"{found.top5:.2f} %"),
        ("loss", f"{found.loss:.4f}"),
        ("MACs", count(cost.macs)),
        ("parameters", count(cost.parameters)),
    ]
    table(f"{chosen.model} with {weights} on {found.images} test images of {data.name}", ("", ""), rows)
