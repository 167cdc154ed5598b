"""The zoo against the papers' counts, the shared weights' keys, and hand-made factories."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from filterfold import zoo
from filterfold.errors import ModelError
from filterfold.zoo import resnet


def weights(model: nn.Module) -> int:
    """Convolution and linear weights, the count of Li et al."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def macs(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-accumulates of one image, from the shapes that pass through."""
    counted = 0

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal counted
        assert isinstance(module, nn.Conv2d | nn.Linear)
        counted += module.weight.numel() * output[0].numel() // output.shape[1]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        model.eval()(images)
    return counted


@pytest.mark.parametrize(
    ("name", "expected_macs", "expected_weights"),
    [
        ("vgg16", 313463808, 14977728),
        ("resnet56", 125485696, 848944),
        ("resnet110", 252887680, 1719856),
    ],
)
def test_counts_of_li_et_al(name: str, expected_macs: int, expected_weights: int) -> None:
    model = zoo.build(name)
    assert weights(model) == expected_weights
    assert macs(model, torch.zeros(1, 3, 32, 32)) == expected_macs


def test_counts_equal_the_reference_table(reference: Path) -> None:
    with (reference / "li2017_table1.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    for name in ("vgg16", "resnet56", "resnet110"):
        assert weights(zoo.build(name)) == int(rows[name]["weights_exact"])


def test_explicit_widths_give_the_pruned_networks_of_li_et_al() -> None:
    pruned = zoo.build_vgg(widths=[32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256, 512])
    assert weights(pruned) == 5390176
    assert macs(pruned, torch.zeros(1, 3, 32, 32)) == 206279680
    skipped = {16, 20, 38, 54}  # layer ids of ResNet-56-A that stay whole
    inner = []
    for block in range(27):
        full = (16, 32, 64)[block // 9]
        inner.append(full if 2 * block + 2 in skipped else int(full * 0.9))
    small = zoo.build_resnet(56, inner=inner)
    assert weights(small) == 769456
    assert macs(small, torch.zeros(1, 3, 32, 32)) == 112435840


@pytest.mark.parametrize("depth", [20, 56])
def test_resnet_has_the_keys_and_shapes_of_the_shared_weights(shared: Path, depth: int) -> None:
    model = zoo.build(f"resnet{depth}")
    with safe_open(shared / "weights" / f"resnet{depth}-cifar10.safetensors", framework="pt") as file:
        expected = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    found = {key: tuple(value.shape) for key, value in model.state_dict().items() if "num_batches" not in key}
    assert found == expected


def test_shortcut_takes_every_second_pixel_and_pads_half_before_half_after() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    out = resnet.PadShortcut(2, 1, 2)(images)
    assert out.shape == (2, 6, 2, 2)
    assert torch.equal(out[:, 1:4], images[:, :, [0, 2]][:, :, :, [0, 2]])
    assert out[:, 0].abs().sum() == 0
    assert out[:, 4:].abs().sum() == 0
    block = resnet.BasicBlock(5, 3, 8, 2)
    assert (block.shortcut.before, block.shortcut.after) == (1, 2)


@pytest.mark.parametrize("name", ["vgg16", "vgg_small", "resnet20", "resnet32", "resnet44"])
@pytest.mark.parametrize(("channels", "classes", "width", "size"), [(1, 7, 0.25, 32), (4, 3, 0.3, 40)])
def test_any_channels_classes_width_and_size(name: str, channels: int, classes: int, width: float, size: int) -> None:
    model = zoo.build(name, classes=classes, channels=channels, width=width, image_size=size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


def test_depth_is_the_number_of_weighted_layers() -> None:
    for depth in (20, 32, 44, 56, 110):
        model = zoo.build(f"resnet{depth}", width=0.25)
        assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_initial_weights_have_he_variance_and_follow_the_seed() -> None:
    torch.manual_seed(0)
    model = zoo.build("vgg16")
    weight = model.state_dict()["features.40.weight"]
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    torch.manual_seed(0)
    again = zoo.build("vgg16").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("hidden = 5\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom helper_of_mine import hidden\n"
        "def tiny(num_classes, in_channels=3, bias=True):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, hidden, 3), torch.nn.Flatten(),\n"
        "                               torch.nn.LazyLinear(num_classes, bias=bias))\n"
        "def no_network():\n    return 3\n"
        "def broken():\n    raise KeyError('oh')\n"
    )
    model = zoo.build(f"{file}:tiny", classes=4, channels=2)
    assert model[0].weight.shape == (5, 2, 3, 3)
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 4)
    with pytest.raises(ModelError, match="returned a int"):
        zoo.build(f"{file}:no_network")
    with pytest.raises(ModelError, match="KeyError: 'oh'"):
        zoo.build(f"{file}:broken")
    with pytest.raises(ModelError, match="nothing called 'tinyy'; did you mean tiny"):
        zoo.build(f"{file}:tinyy")
    with pytest.raises(ModelError, match="no argument 'width'"):
        zoo.build(f"{file}:tiny", width=0.5)


def test_a_module_of_the_users_own() -> None:
    assert zoo.build("filterfold.zoo:build_vgg", classes=3, width=0.1).classifier[3].out_features == 3


def test_timm_and_torchvision_models() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert zoo.build("timm:resnet10t", classes=5, channels=1)(torch.zeros(2, 1, 64, 64)).shape == (2, 5)
    assert zoo.build("torchvision:resnet18", classes=5)(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg61", {}, "no model 'vgg61'; did you mean vgg16"),
        ("zzz", {}, "no model 'zzz'; known are resnet110"),
        ("vgg16", {"width": 0}, "width=0"),
        ("vgg16", {"classes": 0}, "classes=0"),
        ("vgg16", {"image_size": 8}, "at least 32 pixels, not 8"),
        ("nowhere.file:thing", {}, "No module named 'nowhere'"),
        ("nowhere.py:thing", {}, "nowhere.py: no such file"),
        ("math:pi", {}, "pi is a float, not a callable"),
        ("timm:resnet10t", {"width": 0.5}, "no width multiplier"),
    ],
)
def test_refusals_are_one_line(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        zoo.build(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals_of_the_libraries_name_near_models() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match="resnet50"):
        zoo.build("timm:resnet50x")
    with pytest.raises(ModelError, match="did you mean"):
        zoo.build("torchvision:resnet43")
    with pytest.raises(ModelError, match="takes 3 input channels, not 1"):
        zoo.build("torchvision:resnet18", channels=1)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm is not installed; pip install 'filterfold\[zoo\]'"):
        zoo.build("timm:resnet18")


@pytest.mark.parametrize("inner", [[8] * 8, [8] * 8 + [0], [8] * 8 + [2.5]])
def test_explicit_widths_that_do_not_fit(inner: list[float]) -> None:
    with pytest.raises(ModelError, match="resnet20"):
        zoo.build_resnet(20, inner=inner)  # type: ignore[arg-type]
