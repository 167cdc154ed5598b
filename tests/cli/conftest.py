"""Commands are tested at one width, whatever terminal or test runner they are started from."""

from __future__ import annotations

import pytest

from filterfold.cli.display import console


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 140)
