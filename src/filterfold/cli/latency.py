"""`filterfold latency`: how fast networks are, measured against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError, ModelError
from .display import live, say, table
from .figures import Figures
from .inspect import image_shape
from .options import MODEL_HELP, Device, Threads, use_threads
from .weights import with_weights

if TYPE_CHECKING:
    from torch import nn

    from ..profiling import LatencyComparison


EXAMPLES = """
Examples:

  filterfold latency vgg16 small.safetensors

  filterfold latency before.safetensors after.safetensors --model resnet56 --batch 1 --batch 64

  filterfold latency torchvision:resnet18 torchvision:resnet34 --input 3x224x224 --classes 1000 --mode onnxruntime

  filterfold latency small.onnx small-int8.onnx --input 3x224x224

  filterfold latency vgg16 small.safetensors --mode eager --mode channels_last --mode compile --json > times.json
"""


FILES = (".safetensors", ".pt", ".pth", ".bin")


ONNX = ".onnx"


PASS = 128
"""Batch size of the pass over the whole test set, as in the document's experiment."""


def latency(
    networks: Annotated[list[str], Argument(help=f"Files of weights, ONNX files, or names: {MODEL_HELP}")],
    model: Annotated[
        str | None, Option("--model", "-m", help="The network of the files.", show_default="the first name given")
    ] = None,
    image: Annotated[str, Option("--input", help="Input shape: channels x height x width.")] = "3x32x32",
    classes: Annotated[int, Option(help="Number of outputs.")] = 10,
    width: Annotated[float, Option(help="Multiplier on every layer's width, of files and names.")] = 1.0,
    batch: Annotated[
        list[int] | None, Option(help="Images at a time; several times.", show_default="1, 8, 64, 512")
    ] = None,
    mode: Annotated[
        list[str] | None,
        Option(help="eager, channels_last, compile, onnxruntime; several times.", show_default="eager"),
    ] = None,
    repeats: Annotated[int, Option(help="Rounds in which each network is timed.", min=1)] = 20,
    images: Annotated[int, Option(help="Also give the seconds for so many images at batch 128; 0: don't.")] = 10_000,
    widths: Annotated[bool, Option(help="Look for layers whose odd widths save nothing.")] = True,
    device: Device = "auto",
    threads: Threads = None,
) -> Figures:
    """Time networks in turn: median, p90, interval, throughput, speed-up beside the ratio of MACs, and an A/A control.

    The first network is the reference, and is timed a second time as the control, which must give 1.00x.
    """
    import torch

    from ..bench.trials.context import resolve
    from ..profiling import measure_latency, wasted_widths
    from ..zoo import build

    use_threads(threads)
    shape, sizes = image_shape(image), list(dict.fromkeys([*(batch or [1, 8, 64, 512]), *([PASS] if images else [])]))
    with live():
        device = resolve(device)
        fresh = partial(build, classes=classes, channels=shape[0], width=width, image_size=shape[1])
        built = _built(networks, model, device, fresh)
        example = torch.zeros(1, *shape, device=device)
        found = [
            measure_latency(built, example, batch_sizes=sorted(sizes), mode=name, repeats=repeats)  # type: ignore[arg-type]
            for name in dict.fromkeys(mode or ["eager"])
        ]
        middle = sorted(sizes)[len(sizes) // 2]
        looked_at = {name: network for name, network in built.items() if widths and Path(name).suffix != ONNX}
        wasted = {name: wasted_widths(network, example, batch_size=middle) for name, network in looked_at.items()}

    def show() -> None:
        for comparison in found:
            _show(comparison, images)
        for name, remarks in wasted.items():
            for remark in remarks:
                say(f"{name}: a width that wastes what it saved, batch {middle}: {remark}")

    return Figures(_document(found, images, wasted), show)


def _built(
    networks: Sequence[str], model: str | None, device: str, fresh: Callable[[str], nn.Module]
) -> dict[str, nn.Module]:
    """Name or file name → network; one that comes twice gets a number."""
    from ..export.onnx_network import OnnxNetwork

    files = {name for name in networks if Path(name).suffix in FILES}
    exported = {name for name in networks if Path(name).suffix == ONNX}
    base = model or next((name for name in networks if name not in files | exported), None)
    if files and base is None:
        raise ConfigError(f"{min(files)}: say which network the file holds with --model, such as --model vgg16")
    built: dict[str, nn.Module] = {}
    for name in networks:
        if name in files and not Path(name).exists():
            raise ModelError(f"{name}: no such file")
        if name in exported:
            network: nn.Module = OnnxNetwork(name)
        else:
            network = with_weights(lambda: fresh(str(base)), Path(name), device) if name in files else fresh(name)
        shown = Path(name).name if name in files | exported else name
        count = sum(known.partition(" #")[0] == shown for known in built)
        built[f"{shown} #{count + 1}" if count else shown] = network.to(device)
    return built


def _show(found: LatencyComparison, images: int) -> None:
    headings, *rows = found.table()
    seconds = _pass_seconds(found, images)
    if images:
        headings = (*headings, f"{images:,} images, s")
        rows = [(*line, seconds.get(line[0], "") if line[1] == str(PASS) else "") for line in rows]
    table(f"Time of calls, {found.conditions['mode']}", headings, rows, texts=2)
    say(", ".join(f"{key} {value}" for key, value in found.conditions.items() if value is not None))
    for warning in found.warnings:
        say(f"warning: {warning}")


def _pass_seconds(found: LatencyComparison, images: int) -> dict[str, str]:
    """Seconds for a whole test set at batch 128, from the median call."""
    return {row.model: f"{row.median * images / PASS:.3f}" for row in found.rows if images and row.batch_size == PASS}


def _document(found: Sequence[LatencyComparison], images: int, wasted: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    from ..utils.environment import describe

    return {
        "environment": describe(),
        "comparisons": [
            {**comparison.to_dict(), "images": images, "image_seconds": _pass_seconds(comparison, images)}
            for comparison in found
        ],
        "wasted_widths": wasted,
    }
