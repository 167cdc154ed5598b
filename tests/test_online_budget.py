"""One budget for the whole network: what clusters well narrows first, milestones take steps of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from filterfold.cost import measure
from filterfold.errors import ConfigError, SelectionError
from filterfold.online import OnlineFilterClustering, Schedule

X = torch.zeros(1, 3, 8, 8)


def net() -> nn.Sequential:
    """The first layer's 24 filters are four, six times over; the second's are unrelated."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, bias=False), nn.ReLU(), nn.Conv2d(24, 24, 3, bias=False), nn.ReLU(), nn.Conv2d(24, 4, 1)
    )
    with torch.no_grad():
        model[0].weight[4:] = model[0].weight[:4].repeat(5, 1, 1, 1)
    return model


@pytest.mark.parametrize("method", ["fold", "l1"])
def test_what_clusters_narrows_first_and_the_budget_is_met(method: str):
    model = net()
    full = measure(model, X).macs
    OnlineFilterClustering(model, X, macs=0.5, method=method).cluster_and_prune()
    assert measure(model, X).macs <= 0.5 * full
    assert model[0].out_channels < 16
    assert model[2].out_channels == 24


def test_milestones_take_steps_of_the_budget_also_after_a_restart():
    model = net()
    full = measure(model, X).macs
    schedule = Schedule(milestones=((1, 0.5), (2, 1.0)))
    online = OnlineFilterClustering(model, X, macs=0.2, schedule=schedule, round_to=4)
    online.step(1)
    assert 0.2 * full < measure(model, X).macs <= 0.6 * full
    again = OnlineFilterClustering(model, X, macs=0.2, schedule=schedule, round_to=4)
    again.load_state_dict(online.state_dict())
    again.step(2)
    assert 0.1 * full < measure(model, X).macs <= 0.2 * full
    assert (model[0].out_channels % 4, model[2].out_channels % 4) == (0, 0)


def test_refusals():
    with pytest.raises(ConfigError, match="not keep and macs"):
        OnlineFilterClustering(net(), X, macs=0.5, keep=0.5)
    with pytest.raises(ConfigError, match="lies in"):
        OnlineFilterClustering(net(), X, macs=1.5)
    with pytest.raises(SelectionError, match="narrowest"):
        OnlineFilterClustering(net(), X, macs=1e-6).cluster_and_prune()
