"""A small task that trains in well under a second."""

from __future__ import annotations

import pytest

from filterfold import data
from filterfold.data import ImageData


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return data.load("digits", train_limit=200, validation=100)
