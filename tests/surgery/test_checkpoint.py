"""A pruned model comes back bit for bit, nothing is executed, and nothing is half loaded."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from filterfold.errors import CheckpointError
from filterfold.graph.trace import trace
from filterfold.plan import Cut, Plan, keep_units
from filterfold.surgery.apply import apply
from filterfold.surgery.checkpoint import inspect, load, save
from filterfold.surgery.weights import load_weights


class Net(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.first, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1, bias=False)
        if tied:
            self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.norm(self.one(x)) * self.scale)
        return self.first(x).relu() + self.second(x)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(model: nn.Module | None = None) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = model or Net()
    model(X)
    groups = trace(model, X)
    kept = keep_units(8, [0, 3, 4, 7])
    plan = Plan(tuple(Cut(g.name, kept, g.producers, g.consumers) for g in groups if g.frozen is None))
    apply(plan, model)
    return model.eval(), plan


def test_the_same_outputs_bit_for_bit(tmp_path):
    model, plan = pruned()
    save(model, tmp_path / "small.safetensors", plan=plan, metadata={"top1": 93.4, "seeds": [1, 2]})
    loaded = load(tmp_path / "small.safetensors", Net).eval()
    assert model.one.out_channels == loaded.one.out_channels == loaded.deep.groups == 4
    assert torch.equal(loaded(X), model(X))
    assert loaded.first.weight is loaded.second.weight
    found = inspect(tmp_path / "small.safetensors")
    assert found.plans == (plan,)
    assert found.metadata == {"top1": 93.4, "seeds": [1, 2]}
    assert found.shapes["one.weight"] == (4, 3, 3, 3)
    loaded(X).sum().backward()
    assert loaded.one.weight.grad.shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    "change", [lambda m: m.half(), lambda m: m.to(memory_format=torch.channels_last), nn.Module.double]
)
def test_type_and_memory_format_come_back(tmp_path, change):
    model = change(pruned()[0])
    save(model, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors", Net).eval()
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def test_wrappers_and_instances(tmp_path):
    model, _ = pruned()
    save(torch.optim.swa_utils.AveragedModel(model), tmp_path / "a.safetensors")
    dense = Net()
    assert load(tmp_path / "a.safetensors", dense) is dense
    assert torch.equal(dense.eval()(X), model(X))
    untied = load(tmp_path / "a.safetensors", lambda: Net(tied=False)).eval()
    assert untied.first.weight is not untied.second.weight
    assert torch.equal(untied(X), model(X))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_headers_of_all_lengths_are_told_from_pickles(tmp_path, length):
    path, net = tmp_path / "x.safetensors", nn.Linear(2, 2)
    save(net, path, metadata={"": ""})
    start = int.from_bytes(path.read_bytes()[:8], "little")
    save(net, path, metadata={"": "." * (length - start)})
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    assert torch.equal(load(path, nn.Linear(2, 2)).weight, net.weight)


def test_saving_replaces_the_file_in_one_step(tmp_path):
    path = tmp_path / "new" / "small.safetensors"
    save(nn.Linear(2, 2), path)
    save(nn.Linear(3, 2), path)
    assert load(path, lambda: nn.Linear(2, 2)).in_features == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["small.safetensors"]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(path, model, load_function, message: str) -> None:
    before, text = state(model), str(model)
    with pytest.raises(CheckpointError) as caught:
        load_function(path, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(model) == text
    assert before.keys() == state(model).keys()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


class Trap:
    opened = False

    def __reduce__(self):
        return (setattr, (Trap, "opened", True))


def test_what_load_refuses(tmp_path):
    model, _ = pruned()
    good = tmp_path / "good.safetensors"
    save(model, good)
    refused(tmp_path / "none", Net(), load, "none: no such file")
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-10])
    refused(tmp_path / "cut", Net(), load, "cut: not a whole safetensors file")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", Net(), load, "text: not a whole safetensors file")
    torch.save({"trap": Trap()}, tmp_path / "trap.pt")
    refused(tmp_path / "trap.pt", Net(), load, "a pickle (torch.save), which load() never opens")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap()))
    refused(tmp_path / "trap.pkl", Net(), load, "a pickle")
    assert not Trap.opened
    save_file(load_file(good), tmp_path / "plain")
    refused(tmp_path / "plain", Net(), load, "without Filterfold's structure: use load_weights()")
    refused(good, nn.Conv2d(3, 4, 1), load, "has no module 'deep'")
    with pytest.raises(CheckpointError, match="the factory returned a int"):
        load(good, lambda: 3)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("filterfold", lambda text: "99", "checkpoint format '99', this version reads '1'"),
        ("structure", lambda text: "{", "damaged header: 'structure'"),
        ("structure", lambda text: "[]", "damaged header: TypeError"),
        ("structure", lambda text: text.replace("[4, 3, 3, 3]", "[5, 3, 3, 3]"), "tensor 'one.weight' is (4, 3, 3, 3)"),
        (
            "structure",
            lambda text: text.replace('"one.bias"', '"one.bis"'),
            "tensor 'one.bis' is missing from the file",
        ),
        (
            "structure",
            lambda text: text.replace("BatchNorm2d", "BatchNorm3d"),
            "but the checkpoint has a torch.nn.modu",
        ),
    ],
)
def test_damaged_headers_are_refused(tmp_path, key, change, message):
    from safetensors import safe_open

    save(pruned()[0], tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        header = dict(file.metadata())
    header[key] = change(header[key])
    save_file(load_file(tmp_path / "good"), tmp_path / "bad", metadata=header)
    refused(tmp_path / "bad", Net(), load, "does not match its checksum")
    del header["checksum"]
    save_file(load_file(tmp_path / "good"), tmp_path / "bad", metadata=header)
    refused(tmp_path / "bad", Net(), load, message)


def test_what_save_refuses(tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"a": object()}

    with pytest.raises(CheckpointError, match="'0' \\(Extra\\) has extra state"):
        save(nn.Sequential(Extra()), tmp_path / "x")
    with pytest.raises(CheckpointError, match="must be JSON-able"):
        save(nn.Linear(2, 2), tmp_path / "x", metadata={"a": object()})
    with pytest.raises(CheckpointError, match="weight is not an ordinary dense tensor"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    ],
)
def test_state_dicts_load_however_they_are_wrapped(tmp_path, wrap):
    model, other = Net(), Net()
    other.scale.copy_(model.scale)
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pt")
    weight = other.one.weight
    load_weights(other, tmp_path / "weights.pt")
    assert other.one.weight is weight
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_safetensors_load_by_key(tmp_path):
    model, other = Net(), Net()
    save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, state(model)[name]) for name, value in state(other).items())
    save(model, tmp_path / "own.safetensors")
    load_weights(other := Net(), tmp_path / "own.safetensors")
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_what_load_weights_refuses(tmp_path):
    def run(path, model):
        load_weights(model, path)

    good = Net().state_dict()
    save_file({n: t.clone() for n, t in good.items() if "norm" not in n}, tmp_path / "a")
    refused(tmp_path / "a", Net(), run, "missing: norm.bias, norm.running_mean, norm.running_var and 1 more")
    renamed = {name.replace("deep", "deeep"): value.clone() for name, value in good.items()}
    save_file(renamed, tmp_path / "b")
    refused(tmp_path / "b", Net(), run, "unknown: deeep.bias, deeep.weight; is deeep.bias meant as deep.bias?")
    save(pruned()[0], tmp_path / "c")
    refused(tmp_path / "c", Net(), run, "deep.bias has shape (4,), the model (8,)")
    refused(tmp_path / "c", Net(), run, "it is a pruned checkpoint: use load()")
    torch.save({"trap": Trap()}, tmp_path / "d")
    refused(tmp_path / "d", Net(), run, "d: not a plain state dict (")
    assert not Trap.opened
    torch.save([1, 2], tmp_path / "e")
    refused(tmp_path / "e", Net(), run, "holds a list without tensors")
    torch.save(copy.deepcopy(good), tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:500])
    refused(tmp_path / "f", Net(), run, "f: not a plain state dict (")


def test_the_header_is_json_that_people_can_read(tmp_path):
    save(nn.Conv2d(3, 2, 1), tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert json.loads(header["structure"])["modules"][""][1]["out_channels"] == 2
