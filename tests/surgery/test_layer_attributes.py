"""Attributes follow shapes, and a dense model takes the sizes of a pruned one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from filterfold.errors import CheckpointError, SurgeryError
from filterfold.surgery.layer_attributes import refresh_attributes, restore, snapshot
from filterfold.utils.modules import unwrap


def resize(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    for name, shape in shapes.items():
        getattr(module, name).data = torch.zeros(shape)


@pytest.mark.parametrize(
    ("layer", "shapes", "expected"),
    [
        (nn.Conv1d(6, 8, 3), {"weight": (5, 4, 3)}, {"in_channels": 4, "out_channels": 5, "groups": 1}),
        (nn.Conv2d(1, 8, 3), {"weight": (5, 1, 3, 3)}, {"in_channels": 1, "out_channels": 5, "groups": 1}),
        (nn.Conv2d(6, 6, 3, groups=6), {"weight": (4, 1, 3, 3)}, {"in_channels": 4, "out_channels": 4, "groups": 4}),
        (nn.Conv2d(6, 12, 3, groups=6), {"weight": (8, 1, 3, 3)}, {"in_channels": 4, "out_channels": 8, "groups": 4}),
        (nn.Conv2d(6, 9, 3, groups=3), {"weight": (6, 1, 3, 3)}, {"in_channels": 3, "out_channels": 6, "groups": 3}),
        (nn.Conv3d(6, 8, 1), {"weight": (8, 2, 1, 1, 1)}, {"in_channels": 2, "out_channels": 8}),
        (nn.ConvTranspose2d(6, 8, 2), {"weight": (4, 5, 2, 2)}, {"in_channels": 4, "out_channels": 5}),
        (
            nn.ConvTranspose2d(6, 12, 2, groups=6),
            {"weight": (4, 2, 2, 2)},
            {"in_channels": 4, "out_channels": 8, "groups": 4},
        ),
        (
            nn.ConvTranspose2d(6, 8, 2, groups=2),
            {"weight": (4, 3, 2, 2)},
            {"in_channels": 4, "out_channels": 6, "groups": 2},
        ),
        (nn.Linear(6, 8), {"weight": (3, 2)}, {"in_features": 2, "out_features": 3}),
        (nn.BatchNorm2d(6), {"weight": (4,)}, {"num_features": 4}),
        (nn.BatchNorm1d(6, affine=False), {"running_mean": (4,)}, {"num_features": 4}),
        (nn.SyncBatchNorm(6), {"weight": (4,)}, {"num_features": 4}),
        (nn.InstanceNorm2d(6, affine=True), {"weight": (4,)}, {"num_features": 4}),
        (nn.GroupNorm(2, 6), {"weight": (4,)}, {"num_channels": 4, "num_groups": 2}),
        (nn.GroupNorm(6, 6), {"weight": (4,)}, {"num_channels": 4, "num_groups": 4}),
        (nn.LayerNorm(6), {"weight": (4,)}, {"normalized_shape": (4,)}),
        (nn.RMSNorm(6), {"weight": (4,)}, {"normalized_shape": (4,)}),
        (nn.PReLU(6), {"weight": (4,)}, {"num_parameters": 4}),
        (nn.Embedding(6, 8), {"weight": (6, 5)}, {"num_embeddings": 6, "embedding_dim": 5}),
        (nn.Bilinear(4, 5, 6), {"weight": (3, 2, 5)}, {"in1_features": 2, "in2_features": 5, "out_features": 3}),
    ],
)
def test_attributes_follow_the_shapes(layer, shapes, expected):
    resize(layer, **shapes)
    refresh_attributes(layer)
    assert {name: getattr(layer, name) for name in expected} == expected


def test_a_subclass_follows_its_base_class():
    class StandardisedConv(nn.Conv2d):
        pass

    layer = StandardisedConv(6, 8, 3)
    resize(layer, weight=(5, 6, 3, 3))
    refresh_attributes(layer)
    assert layer.out_channels == 5


def test_parametrised_and_old_style_weights_are_read_where_they_live():
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    new.parametrizations.weight.original0.data = torch.ones(2, 1)
    new.parametrizations.weight.original1.data = torch.ones(2, 3)
    refresh_attributes(new)
    assert new.out_features == 2
    masked = prune.identity(nn.Linear(3, 4), "weight")
    masked.weight_orig.data = torch.ones(2, 3)
    refresh_attributes(masked)
    assert masked.out_features == 2


def test_sizes_that_fit_no_layer_are_refused():
    norm, grouped = nn.GroupNorm(2, 6), nn.Conv2d(6, 8, 3, groups=2)
    resize(norm, weight=(5,))
    resize(grouped, weight=(5, 3, 3, 3))
    with pytest.raises(SurgeryError, match="5 channels don't divide into its 2 groups"):
        refresh_attributes(norm)
    with pytest.raises(SurgeryError, match="6 inputs and 5 outputs don't divide into 2 groups"):
        refresh_attributes(grouped)
    for layer, sizes in ((nn.MultiheadAttention(4, 2), (12, 3)), (nn.EmbeddingBag(4, 2), (4, 1))):
        resize(layer, **{"in_proj_weight" if len(layer._modules) else "weight": sizes})
        with pytest.raises(SurgeryError, match=f"{type(layer).__name__} can't be cut"):
            refresh_attributes(layer)
    lstm = nn.LSTM(4, 3)
    resize(lstm, weight_ih_l0=(9, 4))
    with pytest.raises(SurgeryError, match="LSTM can't be cut"):
        refresh_attributes(lstm)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.width = width
        self.sizes = [width, (width, 1)]
        self.flag = True
        self.head = nn.Linear(width, 2)
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)) * self.scale)


def test_snapshot_survives_json_and_restores_every_size():
    small, dense = Net(5).double(), Net(8)
    dense.conv.weight.requires_grad_(False)
    weight = dense.conv.weight
    restore(dense, json.loads(json.dumps(snapshot(small))))
    assert snapshot(dense) == snapshot(small)
    assert dense.sizes == [5, (5, 1)]
    assert dense.width == 5
    assert dense.flag is True
    assert dense.conv.weight is weight
    assert not weight.requires_grad
    dense.load_state_dict(small.state_dict())
    x = torch.randn(2, 3, 5, 5).double()
    dense.scale.fill_(1)
    assert torch.equal(dense.eval()(x), small.eval()(x))


def test_restore_ignores_wrappers():
    small, dense = Net(5), Net(8)
    averaged = torch.optim.swa_utils.AveragedModel(small)
    restore(torch.nn.DataParallel(dense), snapshot(averaged))
    assert snapshot(dense) == snapshot(small)
    assert unwrap(torch.compile(dense, backend="eager")) is dense


def damage(path: str, value: object) -> dict:
    structure = snapshot(Net(5))
    part, *middle, last = path.split("/")
    place = structure[part]
    for key in middle:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return structure


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (damage("modules/conv/0", "torch.nn.Linear"), "module 'conv' is a torch.nn.modules.conv.Conv2d, but the check"),
        (damage("modules//1", {"depth": 3}), "has no size 'depth' to set"),
        (damage("modules//1", {"width": "rm"}), "has no size 'width' to set"),
        (damage("tensors/conv.weight/0", [5, 3]), "tensor 'conv.weight' has shape (8, 3, 3, 3) in the model, (5, 3)"),
        (damage("tensors/other", [[1], "float32"]), "the model has no tensor 'other': was it saved"),
        (damage("tensors/conv.weight/1", "no_dtype"), "damaged structure record: AttributeError"),
        ({}, "damaged structure record: KeyError"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(structure, message):
    dense = Net(8)
    before = snapshot(dense), copy.deepcopy(dense.state_dict())
    with pytest.raises(CheckpointError) as caught:
        restore(dense, structure)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(dense) == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in dense.state_dict().items())
