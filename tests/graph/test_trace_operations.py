"""Less common operations: convolutions spelt out, spectra, indexed writes, regions, fake quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff
from filterfold.graph.rules import RULES

from .networks import check, free
from .test_trace_constructs import Net, conv, image


def product(m: Any, x: Tensor) -> Tensor:
    return m.b((m.w.flatten(1) @ F.unfold(m.a(x), 3, padding=1)).view(len(x), -1, 8, 8).relu())


def by_taps(m: Any, x: Tensor) -> Tensor:
    patches = F.unfold(m.a(x), 3, padding=1).view(len(x), -1, 9, 64)
    return m.b(torch.einsum("bckl,ock->bol", patches, m.w).view(len(x), -1, 8, 8))


def windows(m: Any, x: Tensor) -> Tensor:
    patches = F.pad(m.a(x), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    return m.b(torch.einsum("bchwij,ocij->bohw", patches, m.w))


def weighted_spectrum(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.fft.irfft2(torch.fft.rfft2(m.a(x)) * m.w, s=x.shape[-2:]))


def spectrum(m: Any, x: Tensor) -> Tensor:
    y = torch.fft.rfft2(m.a(x))
    return m.b(torch.fft.irfft2(torch.complex(*m.c(torch.cat([y.real, y.imag], 1)).chunk(2, 1))))


def scattered(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    out = torch.zeros(5, *y.shape[1:]).to(y)
    out[torch.tensor([3, 1])] = y
    return m.b(out)


def clipped(m: Any, x: Tensor) -> Tensor:
    y = m.a(x) * 1
    y[y < 0.1] = 0.3
    return m.b(y)


def drawn(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x) + 0 * torch.normal(m.a(x), 1.0))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "a product": (lambda: Net(product, a=conv(3, 4), w=torch.ones(6, 4, 3, 3), b=conv(6, 2)), {"a": 4, "w": 6}),
    "one axis for the taps": (
        lambda: Net(by_taps, a=conv(3, 4), w=torch.ones(6, 4, 9), b=conv(6, 2)),
        {"a": 4, "w": 6},
    ),
    "windows": (lambda: Net(windows, a=conv(3, 4), w=torch.ones(6, 4, 3, 3), b=conv(6, 2)), {"a": 4, "w": 6}),
    "weighted spectrum": (lambda: Net(weighted_spectrum, a=conv(3, 4), w=torch.ones(4, 8, 5), b=conv(4, 2)), {"a": 4}),
    "convolved spectrum": (lambda: Net(spectrum, a=conv(3, 4), c=conv(8, 12, 1), b=conv(6, 2)), {"a": 4, "c": 6}),
    "written by position": (lambda: Net(scattered, a=conv(3, 6), b=conv(6, 2)), {"a": 6}),
    "written by condition": (lambda: Net(clipped, a=conv(3, 6), b=conv(6, 2)), {"a": 6}),
    "drawn": (lambda: Net(drawn, a=conv(3, 6), b=conv(6, 2)), {"a": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_half_of_everything(name: str) -> None:
    build, expected = CASES[name]
    assert free(check(build(), image())) == expected


def test_positions_that_are_counted_or_written_stay() -> None:
    net = Net(lambda m, x: m.b(m.a(x)).argmax(1), a=conv(3, 6), b=conv(6, 2))
    assert check(net, image()).by_name["b"].frozen == "counted by position in argmax"

    def written(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) * 1
        y[:, torch.tensor([1, 2])] = 1.0
        return m.b(y)

    frozen = check(Net(written, a=conv(3, 6), b=conv(6, 2)), image()).by_name["a"].frozen
    assert "written by position in index_put_" in str(frozen)


def test_pixels_of_one_channel_stay() -> None:
    net = Net(lambda m, x: F.pixel_shuffle(m.b(m.a(x)), 2), a=conv(3, 6), b=conv(6, 4))
    groups = check(net, image())
    assert free(groups) == {"a": 6}
    assert "all of them make one channel in pixel_shuffle" in str(groups.by_name["b"].frozen)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning")
def test_a_network_that_is_prepared_for_quantisation_is_cut() -> None:
    from torch.ao import quantization

    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)]
    model: Any = nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model)
    torch.manual_seed(0)
    model(torch.randn(4, 3, 8, 8))
    model.apply(quantization.disable_observer).eval()
    x = torch.randn(2, 3, 8, 8)
    result = ff.prune(model, x, keep=0.5, strict=True)
    assert result.plan.widths == {"1": (8, 4), "4": (12, 6)}
    assert model[1].weight_fake_quant.scale.shape == (4,)
    model.train()(x).sum().backward()


def crops(x: Tensor, rois: Tensor, _scale: float, height: int, width: int, _ratio: int, _aligned: bool) -> Tensor:
    """Means of crops: what `roi_align` gives, without its interpolation."""
    found = [x[int(n), :, int(top) : int(top) + 3, int(left) : int(left) + 3] for n, top, left, *_ in rois.tolist()]
    return F.adaptive_avg_pool2d(torch.stack(found), (height, width))


def test_channels_pass_through_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name of our own, since torchvision's operation may not be there."""
    library = torch.library.Library("ourvision", "DEF")
    library.define("roi_align(Tensor input, Tensor rois, float s, int h, int w, int r, bool a) -> Tensor")
    library.impl("roi_align", crops, "CPU")
    monkeypatch.setitem(RULES, "ourvision::roi_align", RULES["torchvision::roi_align"])
    rois = torch.tensor([[0.0, 1, 1, 4, 4], [1, 2, 0, 5, 5], [1, 3, 3, 6, 6]], dtype=torch.float64)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.ops.ourvision.roi_align(m.a(x), rois, 1.0, 2, 2, 0, True).flatten(1))

    assert free(check(Net(run, a=conv(3, 6), c=nn.Linear(24, 2)), image())) == {"a": 6}
