"""Sizes written into user code: rewritten where the labels say how, refused by name where not."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff
import filterfold.surgery.apply as surgery
from filterfold.graph import UnrepairableError, rewrite_stale_sizes, trace
from filterfold.plan import Cut, Plan, keep_units

from .networks import call, check, free, half, masked, randomise


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Blur(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.ones(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, groups=self.channels, padding=1)


class Pieces(nn.Module):
    """Split sizes in a list, a slice bound, and a view that names the width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.sizes = [6, 2, 4]
        self.keep = 4
        self.branch = nn.Conv2d(6, 4, 1)
        self.blur = Blur(12)
        self.last = nn.Linear(12 * 4, 2)
        self.width = 12

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.first(x), self.sizes, dim=1)
        x = torch.cat([self.branch(a), b, c, c[:, : self.keep // 2]], 1)
        x = self.blur(x)
        return self.last(F.adaptive_avg_pool2d(x, 2).view(-1, self.width * 4))


def test_lists_bounds_views_and_functional_groups_follow_the_cut() -> None:
    model = randomise(Pieces())
    groups = trace(model, image())
    assert free(groups) == {"first": 12, "branch": 4}
    plan = half(groups)
    small = copy.deepcopy(model)
    surgery.apply(plan, small)
    changes = {
        (change.module, change.attribute): change.new for change in rewrite_stale_sizes(small, plan, groups, image())
    }
    kept = {cut.group: cut.new_size for cut in plan.cuts}
    width = small.last.weight.shape[1] // 4
    assert changes[("", "sizes")] == tuple(small.sizes)
    assert sum(small.sizes) == kept["first"]
    assert small.sizes[0] == small.branch.weight.shape[1]
    assert changes[("", "width")] == width == small.blur.kernel.shape[0]
    assert changes[("blur", "channels")] == width
    torch.testing.assert_close(call(small, image()), call(masked(model, plan), image()), rtol=1e-9, atol=1e-10)


def test_nothing_to_repair_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    groups = trace(model, image())
    plan = half(groups)
    surgery.apply(plan, model)
    assert rewrite_stale_sizes(model, plan, groups, image()) == ()


class Computed(nn.Module):
    """A view whose size is computed from another layer's width: no attribute can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        return self.last(self.inner(x).reshape(n, c, h * w).reshape(n, c, h, w))


def test_what_cannot_be_repaired_names_the_groups_and_leaves_the_model_alone() -> None:
    model = randomise(Computed())
    groups = trace(model, image())
    group = groups.by_name["stem"]
    plan = Plan((Cut("stem", keep_units(8, range(5)), group.producers, group.consumers),))
    surgery.apply(plan, model)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(
        UnrepairableError, match=r"reshape: uses \(2, 5, 64\) where \(2, 8, 64\) is right; leave"
    ) as caught:
        rewrite_stale_sizes(model, plan, groups, image())
    assert caught.value.groups == ("stem",)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_equal_cuts_of_both_need_no_repair() -> None:
    assert free(check(Computed(), image())) == {"stem": 8, "inner": 8}


class Heads(nn.Module):
    """Self-attention with fused q, k, v; `scale=None` takes the scale from the size of a head."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.embed, self.qkv, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 48), nn.Linear(16, 2)
        self.heads, self.inner, self.scale = 4, 16, scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.last(x.transpose(1, 2).reshape(n, length, self.inner))


def test_attention_shrinks_heads_where_the_scale_follows_their_size() -> None:
    groups = check(Heads(None), image())
    assert free(groups) == {"embed": 8, "qkv": 4}
    assert groups.by_name["qkv"].exact


def test_attention_with_its_own_scale_shrinks_every_head() -> None:
    groups = check(Heads(0.5), image())
    assert free(groups) == {"embed": 8, "qkv": 4}
    assert not groups.by_name["qkv"].exact


class Auxiliary(nn.Module):
    """A second head that only runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.bn = nn.Conv2d(3, 8, 1), nn.Dropout(), nn.BatchNorm2d(8)
        self.head, self.side, self.unused = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.drop(self.bn(self.body(x)))
        return (self.head(x), self.side(x)) if self.training else self.head(x)


def test_branches_that_exist_only_in_training_are_cut_along() -> None:
    model = Auxiliary().double()
    mean = model.bn.running_mean.clone()
    groups = trace(model, image())
    assert groups.unmet == ("unused.weight", "unused.bias")
    assert {part.tensor for part in groups.by_name["body"].consumers} == {"head.weight", "side.weight"}
    assert torch.equal(model.bn.running_mean, mean)
    assert model.training
    surgery.apply(half(groups), model)
    assert [tuple(output.shape) for output in model(image())] == [(2, 2, 8, 8)] * 2


class Caching(nn.Module):
    """Keeps a table in a dictionary once it has been computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.cache = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), {}
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.view(-1, 1, 1) * 2
        return self.b(x + self.cache["bias"])


def test_caches_are_given_back_and_freeze_what_they_keep() -> None:
    model = Caching().double()
    assert "kept by the model from one call to the next" in str(trace(model, image()).by_name["a"].frozen)
    assert model.cache == {}
    model(image())
    assert "must keep the size of a fixed axis" in str(trace(model, image()).by_name["a"].frozen)


class Literal(nn.Module):
    """Sizes as literals in the code, twice the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.last = nn.Linear(12 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).view(2, 8, 8, 8).relu())
        gate = x.view(2, 12, 64).mean(2).view(2, 12, 1, 1)
        return self.last((x * gate.sigmoid()).reshape(2, 12 * 64))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("kind", ["fx", "export"])
def test_constants_in_the_code_of_a_graph_follow_the_cut(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = randomise(Literal())
    model: nn.Module = torch.fx.symbolic_trace(plain)
    if kind == "export":
        model = torch.export.export(plain, (image(),)).module()
    with torch.no_grad():
        untouched = copy.deepcopy(model)
    code = model.code
    result = ff.prune(model, image(), keep=0.5, strict=True)
    assert result.plan.widths == {"a": (8, 4), "b": (12, 6)}
    torch.testing.assert_close(call(model, image()), call(masked(untouched, result.plan), image()))
    assert "(2, 8, 8, 8)" not in model.code.replace("[", "(").replace("]", ")")
    assert untouched.code == code
    assert ff.apply(result.plan, untouched).attributes
    assert untouched.code == model.code
    assert capsys.readouterr().err == ""


def test_a_cut_graph_is_saved_and_rebuilt(tmp_path: Path) -> None:
    model = torch.fx.symbolic_trace(randomise(Literal()))
    ff.prune(model, image(), keep=0.5)
    ff.save(model, tmp_path / "small.safetensors")
    again = ff.load(tmp_path / "small.safetensors", lambda: torch.fx.symbolic_trace(Literal()).double().eval())
    torch.testing.assert_close(call(again, image()), call(model, image()))


class Configured(nn.Module):
    """Sizes in an object or a dictionary that all blocks share."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)
        self.inner = Inner(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.inner(self.b(self.a(x).relu())))


class Inner(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.config["sizes"] if isinstance(self.config, dict) else self.config.sizes
        return x.reshape(len(x), sizes[-1], -1).relu().reshape(len(x), sizes[-1], 8, 8)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_sizes_in_a_configuration_follow_the_cut(kind: Any, tmp_path: Path) -> None:
    model = randomise(Configured(kind(sizes=[8, 12], name="x", image=224)))
    untouched = copy.deepcopy(model)
    result = ff.prune(model, image(), keep=0.5, strict=True)
    config = model.config if kind is dict else vars(model.config)
    assert config == {"sizes": [8, 6], "name": "x", "image": 224}
    assert [(change.attribute, change.new) for change in result.plan.attributes] == [("config.sizes", (8, 6))]
    torch.testing.assert_close(call(model, image()), call(masked(untouched, result.plan), image()))
    receipt = ff.apply(result.plan, untouched)
    assert untouched.inner.config is untouched.config
    receipt.rollback()
    assert call(untouched, image())[0].shape == (2, 2, 8, 8)
    ff.save(model, tmp_path / "small.safetensors")
    again = ff.load(tmp_path / "small.safetensors", lambda: Configured(kind(sizes=[8, 12], name="x")).double().eval())
    torch.testing.assert_close(call(again, image()), call(model, image()))


class Anchored(nn.Module):
    """Makes a grid in forward, as detectors do, before it uses a width that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)
        self.width = 12

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.arange(x.shape[-1], dtype=x.dtype).detach() + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        x = self.b(self.a(x + grid).relu())
        return self.c(x.view(len(x), self.width, -1).relu().view(len(x), self.width, 8, 8))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_pytorch_adds_under_one_mode_only_is_no_step(batch: int) -> None:
    """One example is traced while its cost is counted: `arange` is followed by a `detach` then."""
    model = randomise(Anchored())
    result = ff.prune(model, image()[:batch], keep=0.5, strict=True)
    assert result.plan.widths == {"a": (8, 4), "b": (12, 6)}
    assert model.width == 6


class Asserting(nn.Module):
    """Checks its input before the first operation of its own: no operation here is called with a wrong number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(x)


def test_size_in_the_module_that_asserts_it() -> None:
    model = randomise(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), Asserting(8), nn.Conv2d(6, 2, 1)))
    result = ff.prune(model, torch.randn(1, 3, 4, 4, dtype=torch.float64), keep=0.5)
    assert not result.frozen
    assert model[1].channels == 4


class Focal(nn.Module):
    """Splits by the width of its input, which no attribute holds: FocalNet's modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.f = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 35, 1)
        self.context, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.first(x).relu()).relu()
        q, context, gates = self.f(y).split((y.shape[1], y.shape[1], 3), 1)
        return self.out(q * sum(self.context(context) * gates[:, i : i + 1] for i in range(3)))


def test_split_by_a_width_that_only_the_code_knows() -> None:
    model, x = randomise(Focal()), image()
    whole = copy.deepcopy(model)
    result = ff.prune(model, x, keep=0.5)
    assert not result.frozen
    # Of the 16 channels and the three gates, which are one group now, half are nine, and the gates stay.
    assert (model.first.out_channels, model.a.out_channels, model.f.out_channels) == (4, 6, 15)
    torch.testing.assert_close(call(model, x), call(masked(whole, result.plan), x))
