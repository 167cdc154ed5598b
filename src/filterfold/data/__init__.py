"""Image-classification data: finding, decoding and splitting it, and batches on the device.

`load` finds a data set and splits it; `batches` runs over one of its splits.
"""

from __future__ import annotations

from .load import load
from .splits import ImageData, Split, batches
from .streaming import StreamedSplit

__all__ = ["ImageData", "Split", "StreamedSplit", "batches", "load"]
