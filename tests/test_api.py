"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import filterfold as ff

HEAVY = (
    "torchvision",
    "timm",
    "ray",
    "onnx",
    "matplotlib",
    "sklearn",
    "datasets",
    "statsmodels",
    "pandas",
    "lightning",
)


def test_every_public_name_is_there():
    assert all(getattr(ff, name) is not None for name in ff.__all__)
    assert set(ff.__all__) <= set(dir(ff))
    assert callable(ff.prune)
    assert callable(ff.verify)
    assert not hasattr(ff, "no_such_name")


@pytest.mark.slow
def test_the_import_is_light():
    code = f"import sys, filterfold; print([name for name in {HEAVY!r} + ('scipy.stats',) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_steps_one_by_one_equal_the_verb(tmp_path):
    def factory() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1))

    x, model, original = torch.zeros(1, 3, 8, 8), factory(), factory()
    groups = ff.trace(model, x)
    plan = ff.select(groups, ff.score(groups, model, "l1"), keep=0.5)
    ff.apply(plan, model)
    assert ff.verify(model, original, plan, x, groups=groups)
    other = factory()
    result = ff.prune(other, x, criterion="l1", keep=0.5)
    assert result.plan.cuts == plan.cuts
    ff.save(model, tmp_path / "small.safetensors", plan=plan)
    loaded = ff.load(tmp_path / "small.safetensors", factory)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), other.eval()(x))
