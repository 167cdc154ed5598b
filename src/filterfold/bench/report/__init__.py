"""Reports: tables, plots, and one self-contained HTML page that begins with what may be concluded."""

from __future__ import annotations

from .build import brief, build, verdict
from .trial_table import read_table

__all__ = ["brief", "build", "read_table", "verdict"]
