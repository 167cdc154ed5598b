"""`filterfold export`: a network that Filterfold saved, as a file for other programs; and in 8 bits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import CheckpointError, ConfigError
from .display import live, say, table
from .figures import Figures
from .inspect import image_shape
from .options import MODEL_HELP, DataOptions, Overwrite, Threads, refuse_existing, use_threads
from .weights import suited, with_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..bench.exported import ExportedComparison
    from ..data import ImageData
    from ..export.program import ExportOptions
    from ..surgery.weights import Weights


EXAMPLES = """
Examples:

  filterfold export small.safetensors

  filterfold export small.safetensors --out small.pt2 --dynamic-size --pixels

  filterfold export small.safetensors --model timm:tf_efficientnet_lite0 --input 3x224x224

  filterfold export small.safetensors --int8 --data cifar10 --before resnet56.safetensors --out small-int8.onnx
"""


SAMPLES = 32
"""Test images on which the file is held against PyTorch."""


_data = partial(Option, rich_help_panel="Data")


@dataclass(frozen=True)
class ExportImages(DataOptions):
    """Real images: for the check, for calibration, and to measure on."""

    data: Annotated[
        str, _data("--data", "-d", help="Check on real images, too, and measure: digits, cifar10, a folder, a hub id.")
    ] = ""


@dataclass(frozen=True)
class CodeOptions:
    """The network's code, where the file does not say it."""

    model: Annotated[
        str | None,
        Option("--model", "-m", help=MODEL_HELP, show_default="as noted in the file", rich_help_panel="Model"),
    ] = None
    width: Annotated[
        float | None,
        Option(help="Multiplier on every layer's width.", show_default="as noted", rich_help_panel="Model"),
    ] = None
    image: Annotated[
        str | None,
        Option(
            "--input", help="Input shape: channels x height x width.", show_default="as noted", rich_help_panel="Model"
        ),
    ] = None


@dataclass(frozen=True)
class Int8Options:
    """8 bits, and what all is compared with."""

    int8: Annotated[bool, Option("--int8", help="8-bit weights and activations, calibrated on training images.")] = (
        False
    )
    calibration: Annotated[int, Option(help="--int8: so many training images.", min=1)] = 512
    before: Annotated[
        Path | None, Option(help="Weights from before the cut: also measure that network. Needs --data.")
    ] = None
    batch: Annotated[
        list[int] | None, Option(help="Images a call in timing; several times; 0: none.", show_default="1, 64")
    ] = None
    repeats: Annotated[int, Option(help="Rounds in which each network is timed.", min=1)] = 20


def export(
    network: Annotated[Path, Argument(metavar="FILE", help="A network that Filterfold saved, pruned or not.")],
    code: CodeOptions,
    images: ExportImages,
    small: Int8Options,
    out: Annotated[
        Path | None,
        Option(
            "--out", "-o", help="The file: .onnx, .pt2, .ts, .xml (OpenVINO), .pte.", show_default="FILE with .onnx"
        ),
    ] = None,
    dynamic_size: Annotated[bool, Option("--dynamic-size", help="Any height and width, too, not only batch.")] = False,
    pixels: Annotated[bool, Option("--pixels", help="Take bytes from 0 to 255, and normalise in the file.")] = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> Figures:
    """Write a saved network as ONNX, a torch.export program, TorchScript, OpenVINO or ExecuTorch, checked.

    The suffix says which. The file is read back and run before it is there, and must give what PyTorch gives. With
    --data an ONNX file is also measured: size, accuracy, agreement with the first network, time, each in turn.
    """
    from ..export.formats import FORMATS
    from ..surgery.weights import Weights

    use_threads(threads)
    path = out or network.with_suffix(".int8.onnx" if small.int8 else ".onnx")
    _check_asked(path, images, small, tuple(FORMATS))
    for made in (path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])):
        refuse_existing(made, overwrite)
    with live():
        saved = _Saved.read(Weights.read(network), code, images)
        example = saved.example(pixels)
        whole = saved.taking_pixels(saved.model) if pixels else saved.model
        options = saved.options(dynamic_size, pixels)
        if small.int8:
            from ..export.int8 import to_int8

            to_int8(whole, example, path, saved.calibration(small.calibration, pixels), options=options)
        else:
            FORMATS[path.suffix](whole, example, path, options=options)
        found = _measured(saved, path, small, pixels) if saved.data and path.suffix == ".onnx" else None

    def show() -> None:
        if found is not None:
            _show(found)
        say(f"written and checked: {path}")

    return Figures(_document(path, options, found), show)


def _check_asked(path: Path, images: ExportImages, small: Int8Options, known: tuple[str, ...]) -> None:
    """Refuse what makes no sense, before any work."""
    if path.suffix not in known:
        raise ConfigError(f"{path}: the suffix says the form; give one of {', '.join(known)}")
    if small.int8 and path.suffix != ".onnx":
        raise ConfigError(f"{path}: --int8 writes ONNX files, which other programs convert; give a name with .onnx")
    if small.int8 and not images.data:
        raise ConfigError("--int8 is calibrated on images: give --data")
    if small.before is not None and (not images.data or path.suffix != ".onnx"):
        raise ConfigError("--before is measured on images, and as ONNX: give --data and a name with .onnx")
    if not images.data and images != ExportImages(mean=images.mean, std=images.std):
        raise ConfigError("options of the images have no effect without --data")


@dataclass(frozen=True)
class _Saved:
    """A network from its file, with what is known of its code and its images.

    - `shape`: channels, height, width.
    - `normalization`: mean and deviation of each channel, or None if nobody says.
    """

    model: nn.Module
    factory: Mapping[str, Any]
    shape: tuple[int, int, int]
    normalization: tuple[list[float], list[float]] | None
    data: ImageData | None
    noted: Mapping[str, Any]
    plans: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, weights: Weights, code: CodeOptions, images: ExportImages) -> _Saved:
        from ..bench.trials.start import Start, noted_input, noted_network

        if not weights.header:
            raise CheckpointError(f"{weights.source}: not a network that Filterfold saved (ff.save, and every command)")
        noted, expects = noted_network(weights), noted_input(weights)
        name = code.model or _named(weights.source, noted)
        data = None
        if images.data:
            fitting = suited(images, name, Start(weights.source), weights)
            data = fitting.load()
            expects = {"mean": data.train.normalization[0], "std": data.train.normalization[1]}
        elif images.mean:
            expects = dict(zip(("mean", "std"), images.keywords()["normalization"], strict=True))
        arguments = dict(noted.get("arguments", {}))
        shape = _shape(weights.source, code.image, arguments, data)
        arguments |= {"channels": shape[0], "image_size": shape[1]}
        arguments |= {} if code.width is None else {"width": code.width}
        arguments |= {} if data is None else {"classes": len(data.classes)}
        model = _built(name, arguments)
        weights.into(model)
        normalization = (list(expects["mean"]), list(expects["std"])) if "mean" in expects else None
        factory = {"name": name, "arguments": arguments}
        return cls(model.eval(), factory, shape, normalization, data, noted, json.loads(weights.header["plans"]))

    def example(self, pixels: bool) -> Tensor:
        """One image of zeros."""
        import torch

        return torch.zeros(1, *self.shape, dtype=torch.uint8 if pixels else torch.float32)

    def taking_pixels(self, model: nn.Module) -> nn.Module:
        """A network with the normalisation in it."""
        from ..export.pixels import FromPixels

        if self.normalization is None:
            raise ConfigError("--pixels: the file does not note its normalisation; give --mean and --std")
        return FromPixels(model, *self.normalization).eval()

    def inputs(self, images: Tensor, pixels: bool) -> Tensor:
        """What the exported network takes, for normalised images."""
        from ..export.pixels import pixels_of

        return pixels_of(images, *self.normalization) if pixels and self.normalization else images

    def calibration(self, count: int, pixels: bool) -> list[Tensor]:
        """Training images as they are, in an order drawn once."""
        from ..data import batches

        assert self.data is not None
        size = min(SAMPLES, count)
        order = batches(self.data.train, size, shuffle=True, seed=0)
        return [self.inputs(images, pixels) for images, _ in islice(order, -(-count // size))]

    def options(self, dynamic_size: bool, pixels: bool) -> ExportOptions:
        """What the file is to take and to say."""
        from .. import __version__
        from ..data import batches
        from ..export.program import ExportOptions

        takes: dict[str, Any] = {
            "shape": ["batch", *self.shape],
            "pixels": "bytes, 0 to 255" if pixels else "normalised",
        }
        if self.normalization is not None:
            takes |= dict(zip(("mean", "std"), self.normalization, strict=True))
        classes = list(self.data.classes) if self.data else self.noted.get("classes")
        said = {"filterfold": __version__, "network": self.factory, "classes": classes, "input": takes}
        samples = []
        if self.data is not None:
            images, _ = next(iter(batches(self.data.test, min(SAMPLES, len(self.data.test)))))
            samples = [self.inputs(images, pixels)]
        metadata = {key: value for key, value in {**said, "plans": self.plans}.items() if value}
        return ExportOptions(dynamic_size=dynamic_size, metadata=metadata, samples=samples)


def _named(source: str, noted: Mapping[str, Any]) -> str:
    """The network's name as the file notes it: only one whose code is Filterfold's or a hub's is taken unasked."""
    from ..zoo import is_listed

    name = noted.get("factory")
    if name is None:
        raise ConfigError(f"{source}: the file does not note whose code it is; give --model, such as --model vgg16")
    if is_listed(name):
        return str(name)
    raise ConfigError(f"{source}: its code is {name}, which is not run unasked; give --model {name} if you trust it")


def _shape(source: str, asked: str | None, noted: Mapping[str, Any], data: ImageData | None) -> tuple[int, int, int]:
    if data is not None:
        return data.channels, data.image_size, data.image_size
    if asked is not None:
        return image_shape(asked)
    if not {"channels", "image_size"} <= set(noted):
        raise ConfigError(f"{source}: the file does not note its input's shape; give --input, such as --input 3x32x32")
    return noted["channels"], noted["image_size"], noted["image_size"]


def _built(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    from ..zoo import build

    return build(name, **arguments)


def _measured(saved: _Saved, path: Path, small: Int8Options, pixels: bool) -> ExportedComparison:
    """The networks up to the exported one, each in an ONNX file, on the test images."""
    from ..bench.exported import compare_exported
    from ..export.pixels import ToPixels
    from ..export.program import to_onnx

    assert saved.data is not None
    whole = saved.taking_pixels if pixels else lambda model: model
    example = saved.example(pixels)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        if small.before is not None:
            uncut = with_weights(lambda: _built(saved.factory["name"], saved.factory["arguments"]), small.before, "cpu")
            files["float"] = Path(folder) / "float.onnx"
            to_onnx(whole(uncut), example, files["float"], check=False)
        name = "pruned" if saved.plans else "network"
        if small.int8:
            files[name] = Path(folder) / "pruned.onnx"
            to_onnx(whole(saved.model), example, files[name], check=False)
        files[f"{name} + int8" if small.int8 else name] = path
        return compare_exported(
            files,
            saved.data.test,
            example,
            adapt=partial(ToPixels, mean=saved.normalization[0], std=saved.normalization[1])
            if pixels and saved.normalization
            else None,
            batch_sizes=[size for size in small.batch or (1, 64) if size],
            repeats=small.repeats,
        )


def _show(found: ExportedComparison) -> None:
    headings, *rows = found.table()
    table(f"In ONNX Runtime on {found.images:,} test images", headings, rows)
    if found.latency is not None:
        say(", ".join(f"{key} {value}" for key, value in found.latency.conditions.items() if value is not None))
        for warning in found.latency.warnings:
            say(f"warning: {warning}")


def _document(path: Path, options: ExportOptions, found: ExportedComparison | None) -> dict[str, Any]:
    from ..utils.environment import describe

    said = {key: value for key, value in options.metadata.items() if key != "plans"}
    figures = None if found is None else found.to_dict()
    return {"environment": describe(), "file": str(path), "metadata": said, "figures": figures}
