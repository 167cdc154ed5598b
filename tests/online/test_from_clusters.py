"""Labels of clusters as a plan: numbering, dropped units, and what is refused."""

from __future__ import annotations

import pytest
import torch

from filterfold.errors import SelectionError
from filterfold.online.folding.fold import from_clusters
from filterfold.plan import ChannelGroup, Cut, Slice


def group(name="conv", size=4, *, classes=None, blocks=None, frozen=None, consumers=()):
    parts = (Slice(f"{name}.weight", 0, tuple(range(size)), "filter"),)
    blank = (0,) * size
    return ChannelGroup(name, size, parts, tuple(consumers), True, frozen, classes or blank, blocks or blank)


def test_clusters_become_folds():
    plan = from_clusters([group(size=6), group("other")], {"conv": [9, 4, 9, -1, 0, 4]})
    (cut,) = plan.cuts
    assert cut.assignment == (0, 1, 0, -1, 2, 1)
    assert isinstance(cut, Cut)
    assert cut.folds


def test_clusters_may_be_a_tensor():
    assert from_clusters([group(size=3)], {"conv": torch.tensor([1, 1, 0])}).cuts[0].assignment == (0, 0, 1)


@pytest.mark.parametrize(
    ("one", "labels", "message"),
    [
        (group(), {"cnov": [0] * 4}, "labels: no group is named 'cnov'; did you mean 'conv'?"),
        (group(), {"conv": [0] * 3}, "group 'conv': 3 labels for 4 units"),
        (group(), {"conv": [-1] * 4}, "group 'conv': every unit is dropped; keep at least one"),
        (group(frozen="an output"), {"conv": [0] * 4}, "group 'conv' can't be folded: an output"),
        (
            group(classes=(0, 0, 1, 1)),
            {"conv": [0, 1, 1, 2]},
            "group 'conv': cluster 1 spans more than one class; cluster each class by itself",
        ),
        (group(classes=(0, 0, 1, 1)), {"conv": [0, 0, -1, -1]}, "group 'conv': class 1 is left without a unit"),
        (
            group(blocks=(0, 0, 1, 1)),
            {"conv": [0, 1, 1, 2]},
            "group 'conv': cluster 1 spans more than one block; cluster each block by itself",
        ),
        (group(blocks=(0, 0, 1, 1)), {"conv": [0, 1, 2, 2]}, "group 'conv': blocks keep 1 to 2 units; must be equal"),
    ],
)
def test_clusters_that_are_refused(one, labels, message):
    with pytest.raises(SelectionError) as caught:
        from_clusters([one], labels)
    assert str(caught.value) == message
