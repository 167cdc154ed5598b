"""Pretrained weights of timm and torchvision, with a hub that is faked, and one that can't be reached."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from filterfold import zoo
from filterfold.errors import ModelError

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with weights for every network; what it was asked for."""
    asked: list[str] = []
    create, get = timm.create_model, models.get_model

    def timm_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(f"{name} {pretrained}")
        return create(name, pretrained=False, **options)

    def torchvision_model(name: str, weights: Any = None, **options: Any) -> nn.Module:
        asked.append(f"{name} {weights}")
        return get(name, weights=None, **options)

    monkeypatch.setattr(timm, "create_model", timm_model)
    monkeypatch.setattr(models, "get_model", torchvision_model)
    return asked


def test_a_hub_gives_the_whole_network_as_it_was_trained(hub: list[str]) -> None:
    assert zoo.pretrained("timm:resnet10t")["fc.weight"].shape == (1000, 512)
    assert zoo.pretrained("timm:resnet10t.c3_in1k", channels=1)["conv1.0.weight"].shape[1] == 1
    assert zoo.pretrained("torchvision:squeezenet1_0")["classifier.1.weight"].shape == (1000, 512, 1, 1)
    assert hub == ["resnet10t True", "resnet10t.c3_in1k True", "squeezenet1_0 SqueezeNet1_0_Weights.IMAGENET1K_V1"]


def test_what_networks_expect_is_known_without_a_hub() -> None:
    lite = zoo.expected("timm:tf_efficientnet_lite0")
    assert (lite.mean, lite.std, lite.image_size) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224)
    inception = zoo.expected("torchvision:inception_v3")
    assert (inception.mean, inception.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert inception.image_size == 299


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_a_hub_that_cannot_be_reached_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path_factory: Any
) -> None:
    import huggingface_hub

    nowhere = str(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", nowhere)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: nowhere)

    def unreachable(*_: object, **__: object) -> None:
        sys.stdout.write("Downloading: something")
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ModelError, match=f"^{name}: its pretrained weights can't be had .*--weights") as caught:
        zoo.pretrained(name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg16", "only timm: and torchvision: models have pretrained weights; give a file with --weights"),
        ("timm:resnet50x", "timm has no model 'resnet50x'; did you mean"),
        ("timm:test_byobnet.nothing", "no weights 'test_byobnet.nothing'"),
        ("torchvision:resnet43", "did you mean"),
        ("torchvision:googlenet", "outputs beside its logits"),
    ],
)
def test_what_has_no_pretrained_weights(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        zoo.pretrained(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
