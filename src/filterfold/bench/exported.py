"""Exported networks side by side: size, accuracy, agreement with the first one, and time, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.splits import AnySplit
from ..export.onnx_network import OnnxNetwork
from ..profiling import LatencyComparison, measure_latency
from ..training.evaluate import predicted


@dataclass(frozen=True, slots=True)
class Exported:
    """What one exported network comes to.

    - `bytes`: size of its file.
    - `top1`, `agreement`: percent of the test images of which it gives the right class, and that of the first network.
    """

    name: str
    bytes: int
    top1: float
    agreement: float


@dataclass(frozen=True, slots=True)
class ExportedComparison:
    """Several exported networks, the first of which is the reference.

    - `images`: how many test images there were.
    - `latency`: None if it was not asked for.
    """

    networks: tuple[Exported, ...]
    images: int
    latency: LatencyComparison | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "images": self.images,
            "networks": [{name: getattr(row, name) for name in Exported.__slots__} for row in self.networks],
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    def table(self) -> list[tuple[str, ...]]:
        """Heading and one line a network, as texts; the last line is the A/A control of the times."""
        timed = self.latency
        sizes = sorted({row.batch_size for row in timed.rows}) if timed else []
        heads = [text for size in sizes for text in (f"ms, batch {size}", "speed-up")]
        lines: list[tuple[str, ...]] = [("network", "file", "top-1 %", "agreement %", *heads)]
        known = {row.name: row for row in self.networks}
        for name in [*known, *([timed.rows[-1].model] if timed else [])]:
            row = known.get(name)
            figures = ("", "", "") if row is None else (_size(row.bytes), f"{row.top1:.2f}", f"{row.agreement:.2f}")
            times = [
                text
                for size in sizes
                if timed
                for text in (f"{1e3 * timed.row(name, size).median:.3f}", f"{timed.speedup(name, size):.2f}x")
            ]
            lines.append((name, *figures, *times))
        return lines


def compare_exported(
    files: Mapping[str, Path],
    split: AnySplit,
    example: Tensor,
    *,
    adapt: Callable[[nn.Module], nn.Module] | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 20,
) -> ExportedComparison:
    """Measure networks in ONNX files against each other, run by ONNX Runtime on the CPU.

    **Arguments:**

    - `files`: name → file; the first is the reference.
    - `split`: test images.
    - `example`: what the networks take, one image.
    - `adapt`: makes of a network one that takes the split's normalised images; None: they all do.
    - `batch_sizes`: images a call in timing; none: no timing.
    - `repeats`: rounds of the timing.

    **Raises:** `ExportError` if a file can't be run, `DataError` or `ModelError` if the images don't fit.
    """
    networks = {name: OnnxNetwork(file) for name, file in files.items()}
    told = {name: predicted(adapt(network) if adapt else network, split) for name, network in networks.items()}
    reference = next(iter(told.values()))
    figures = tuple(
        Exported(name, file.stat().st_size, _percent(told[name], split.labels.cpu()), _percent(told[name], reference))
        for name, file in files.items()
    )
    latency = measure_latency(networks, example, batch_sizes=batch_sizes, repeats=repeats) if batch_sizes else None
    return ExportedComparison(figures, len(reference), latency)


def _percent(told: Tensor, expected: Tensor) -> float:
    return 100 * (told == expected).double().mean().item()


def _size(count: int) -> str:
    """A file's size.

    >>> _size(18_802_816), _size(1_100)
    ('18.80 MB', '1.1 kB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
