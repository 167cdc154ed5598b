"""Reports: tables, plots, and one self-contained HTML page that says first what may be concluded."""

from __future__ import annotations

from .build import build, from_table, verdict
from .study import read_table
from .tables import HEADINGS, Row, summary

__all__ = ["HEADINGS", "Row", "build", "from_table", "read_table", "summary", "verdict"]
