"""Half of every channel group of real ConvNets: cut, verified, and held against a masked copy of our own making.

By default a subset that takes about a minute; FILTERFOLD_CONFORMANCE=all runs the list of benchmarks/conformance.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from conformance.jobs import ours
from conformance.models import Entry, entries
from conformance.oracle import TOLERANCE, dead, emptied, error, masked, outputs
from torch import nn

from conformance import foreign
from filterfold.plan import Cut, Plan, Slice

PARTLY = {
    "zoo:resnet20": 1,
    "zoo:resnet56": 1,
    "torchvision:shufflenet_v2_x0_5": 2,
    "torchvision:shufflenet_v2_x1_0": 2,
    "timm:mobilenetv4_hybrid_medium": 8,
    "timm:efficientvit_b0": 8,
    "timm:edgenext_xx_small": 2,
}
"""Network -> how many of its groups stay whole; every other network is cut wholly."""

SUBSET = """
zoo:resnet20 zoo:vgg16 torchvision:squeezenet1_1 torchvision:resnet18 timm:resnet26d timm:skresnet18 timm:cbam:resnet18
timm:seresnet18 timm:res2next50 timm:dla46_c timm:dpn48b timm:hrnet_w18_small timm:ese_vovnet19b_slim timm:cs3darknet_s
torchvision:mobilenet_v2 torchvision:mobilenet_v3_large timm:mixnet_s timm:ghostnet_050 timm:fasternet_t0
torchvision:efficientnet_b0 torchvision:regnet_y_400mf timm:repvgg_a0 timm:nf_regnet_b0 timm:convnextv2_atto
timm:mobilevit_xxs torchvision:shufflenet_v2_x0_5 torchvision:lraspp_mobilenet_v3_large
""".split()  # noqa: SIM905


def chosen() -> list[Entry]:
    if os.environ.get("FILTERFOLD_CONFORMANCE") == "all":
        return list(entries())
    return [entry for entry in entries() if entry.name in SUBSET]


def test_list_has_ninety_networks_without_repetition():
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names) >= 90
    assert {*SUBSET, *PARTLY} <= set(names)


@pytest.mark.parametrize("entry", chosen(), ids=lambda entry: entry.name)
@pytest.mark.slow
def test_half_of_every_group_goes_and_the_network_equals_the_masked_one(entry):
    if not entry.name.startswith("zoo:"):
        pytest.importorskip("timm")
        pytest.importorskip("torchvision")
    report = ours(entry)
    assert report["status"] == ("partly" if entry.name in PARTLY else "wholly"), report
    assert len(report["not_cut"]) == PARTLY.get(entry.name, 0), report["reasons"]
    assert report["verified"]
    assert report["error"] <= TOLERANCE
    assert report["left"] < 0.6


FOREIGN = ("transformers:Segformer", "transformers:DPT", "transformers:ResNet", "smp:Linknet+resnet18")


def test_the_second_list_has_no_repetition():
    lines = [line.split()[0] for line in foreign.LIST.splitlines() if line and not line.startswith("#")]
    assert len(set(lines)) == len(lines) >= 75
    assert {*FOREIGN} <= set(lines)
    assert not {*lines} & {entry.name for entry in entries()}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.slow
def test_networks_of_other_libraries_are_cut_wholly(name):
    entry = next((entry for entry in entries("foreign") if entry.name == name), None)
    if entry is None:
        pytest.skip(f"{name.partition(':')[0]} is not installed")
    report = ours(entry)
    assert report["status"] == "wholly", report
    assert report["error"] <= TOLERANCE


def test_dead_units_are_zero_at_their_source():
    layer = nn.Linear(2, 3)
    made = (Slice("weight", 0, (0, 1, 2), "filter"), Slice("bias", 0, (0, 1, 2), "bias"))
    cut = Plan((Cut("layer", (0, -1, 1), made, ()),))
    assert dead(copy.deepcopy(layer), cut, {"another"}).bias.equal(layer.bias)
    dead(layer, cut, {"layer"})
    assert layer.weight[1].tolist() == [0, 0]
    assert layer.bias[1] == 0
    assert layer.weight[[0, 2]].ne(0).all()


class TestOracle:
    """The oracle itself, on a network small enough to do by hand."""

    def network(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def cut(self, network: nn.Sequential, made: list[int], read: list[int]) -> nn.Sequential:
        small = copy.deepcopy(network)
        small[0].weight = nn.Parameter(network[0].weight.detach()[made])
        small[0].bias = nn.Parameter(network[0].bias.detach()[made])
        small[2].weight = nn.Parameter(network[2].weight.detach()[:, read])
        return small

    def test_finds_what_was_removed_and_accepts_a_right_cut(self):
        network, x = self.network(), torch.randn(1, 3, 5, 5)
        small = self.cut(network, [0, 3], [0, 3])
        reference = emptied(network, small)
        assert error(outputs(reference, x.double()), outputs(small.double(), x.double())) < 1e-14

    def test_rejects_a_cut_that_reads_other_channels_than_are_made(self):
        network, x = self.network(), torch.randn(1, 3, 5, 5)
        small = self.cut(network, [0, 3], [1, 3])
        reference = emptied(network, small)
        assert error(outputs(reference, x.double()), outputs(small.double(), x.double())) > 1e-2

    def test_masks_by_the_plan_alone(self):
        network, x = self.network(), torch.randn(1, 3, 5, 5)
        plan = Plan((Cut("0", (0, -1, -1, 1), (), (Slice("2.weight", 1, (0, 1, 2, 3), "kernel"),)),))
        small = self.cut(network, [0, 3], [0, 3]).double()
        assert error(outputs(masked(network, plan), x.double()), outputs(small, x.double())) < 1e-14

    def test_an_output_of_another_shape_is_an_infinite_error(self):
        assert error([torch.ones(1, 2)], [torch.ones(1, 3)]) == float("inf")
