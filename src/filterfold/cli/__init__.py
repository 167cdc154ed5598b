"""The command line. Heavy imports happen inside the commands, so that `filterfold --help` is quick."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
