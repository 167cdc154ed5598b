"""Borrowing a model for a while: what is changed on the way in is given back on the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put every module of the models into eval mode, and each back into its own mode afterwards.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(net):
    ...     print(net.training, net[0].training)
    False False
    >>> net.training, net[0].training, net[1].training
    (True, True, False)
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on example inputs: a tuple is spread over the arguments, a mapping over the keywords.

    >>> call(nn.Identity(), (3,))
    3
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)
