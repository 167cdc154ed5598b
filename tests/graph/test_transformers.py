"""Small networks of Hugging Face's families: a pass leaves nothing behind, and what is cut is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import filterfold as ff

pytestmark = pytest.mark.slow

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
FOUR = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}

# name -> (configuration, its options, the model, the side of its images)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "segformer": (
        "SegformerConfig", {**FOUR, "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16},
        "SegformerForSemanticSegmentation", 64,
    ),
    "dpt": (
        "DPTConfig",
        {
            **VIT, "image_size": 32, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5],
        },
        "DPTForDepthEstimation", 32,
    ),
    "resnet": (
        "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ResNetForImageClassification", 64,
    ),
    "regnet": (
        "RegNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        "RegNetForImageClassification", 64,
    ),
    "convnext": (
        "ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "ConvNextForImageClassification", 64,
    ),
    "vit": ("ViTConfig", {**VIT, "image_size": 32}, "ViTForImageClassification", 32),
    "beit": ("BeitConfig", {**VIT, "image_size": 32, "out_indices": [1, 2, 3, 4]}, "BeitForImageClassification", 32),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "SwinForImageClassification", 32,
    ),
    "pvt v2": (
        "PvtV2Config", {**FOUR, "image_size": 64, "hidden_sizes": [8, 16, 16, 32], "mlp_ratios": [2, 2, 2, 2]},
        "PvtV2ForImageClassification", 64,
    ),
    "poolformer": (
        "PoolFormerConfig", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        "PoolFormerForImageClassification", 64,
    ),
    "glpn": (
        "GLPNConfig", {**FOUR, "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 8}, "GLPNForDepthEstimation", 64,
    ),
}  # fmt: skip


SCALED = ("pvt v2", "glpn")
"""One head has all channels of the first stage here, and its temperature is taken from their number."""


def built(name: str) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config, options, model, side = FAMILIES[name]
    torch.manual_seed(0)
    network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return network.eval(), torch.randn(1, 3, side, side)


def tensors(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [value for value in model(x).values() if isinstance(value, Tensor)]


def state(model: nn.Module) -> list[Any]:
    """Attributes of all modules, the keys of their hooks and children, and the configuration's values."""
    found: list[Any] = [copy.deepcopy(vars(getattr(model, "config", nn.Module())))]
    for module in model.modules():
        found.append({name: id(value) for name, value in vars(module).items()})
        found.append({name: list(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return found


def unchanged(model: nn.Module, act: Callable[[], Any]) -> None:
    before, values = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    act()
    assert state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_leaves_nothing_behind(name: str) -> None:
    model, x = built(name)
    expected = tensors(copy.deepcopy(model), x)
    unchanged(model, lambda: ff.trace(model, x))
    torch.testing.assert_close(tensors(model, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_it_goes(name: str) -> None:
    model, x = built(name)
    shapes, before = (
        [value.shape for value in tensors(copy.deepcopy(model), x)],
        sum(p.numel() for p in model.parameters()),
    )
    result = ff.prune(model, x, keep=0.5, strict=name not in SCALED)
    assert result.verified
    assert ("a number follows from how many there are" in str(result.frozen)) == (name in SCALED)
    assert [value.shape for value in tensors(model, x)] == shapes
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    model.train()
    sum(value.float().mean() for value in model(x).values() if isinstance(value, Tensor)).backward()
