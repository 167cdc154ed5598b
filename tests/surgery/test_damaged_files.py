"""A thousand damaged plans and checkpoints: only the project's errors, and a model that was given stays as it is."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold.errors import CheckpointError, FilterfoldError, PlanError
from filterfold.plan import Plan
from filterfold.surgery.checkpoint import inspect
from filterfold.surgery.weights import Weights
from filterfold.utils.io import load_tree, save_tree


class Net(nn.Module):
    """A norm, groups, a depthwise layer, tied tensors, and a size in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.a, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.deep = nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(36, 3)
        self.deep.bias = self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu().view(-1, self.width, 3, 3)
        return self.head(self.deep(self.b(x).relu()).flatten(1))


def plain() -> nn.Module:
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))


X = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
NUMBERS: list[Any] = [
    0,
    1,
    -1,
    -2,
    2,
    7,
    10**6,
    10**12,
    -(10**12),
    2**63,
    2**70,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
]
HOSTILE: list[Any] = [
    *(None, True, False, "", "x", "conv", "0.weight", "filter", "kernel", [], {}, [[]], [1], [None], {"a": 1}),
    *([[0, 10**12, 1]], [[0, 3, 1]], [[1, 2]], [float("nan")] * 6, [1e308] * 6, [0.5] * 6, *NUMBERS),
]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*here, key)
        yield from places(item, (*here, key))


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def mutated(document: Any, rng: random.Random) -> Any:
    """A document with one to three entries changed, left out, doubled or taken from elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = list(places(document))
        if not every:
            break
        *above, key = rng.choice(every)
        holder, how = at(document, tuple(above)), rng.randrange(10)
        if how < 6:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif how == 6:
            del holder[key]
        elif how == 7 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == 8:
            holder[key] = copy.deepcopy(at(document, rng.choice(every)))
        elif isinstance(holder, dict):
            holder[rng.choice(("blend", "gain", "weight", "other"))] = copy.deepcopy(rng.choice(HOSTILE))
    return document


def scribbled(content: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a missing end or middle, or something put in."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, how = rng.randrange(max(len(found), 1)), rng.randrange(4)
        if how == 0 and found:
            found[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[place : place + rng.choice((1, 8, 10**9))]
        elif how == 2:
            found[place:place] = rng.choice((b"9", b"[", b"{", b'"', b"-", b"e9", b"NaN", b"null"))
        elif found:
            found[place] = rng.randrange(256)
    return bytes(found)


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sizes = [{k: v for k, v in vars(m).items() if isinstance(v, int | tuple | str)} for m in model.modules()]
    return [str(model), sizes, [(name, id(tensor), tensor.tolist(), tensor.stride()) for name, tensor in tensors]]


def tried(use: Callable[[nn.Module], object], model: nn.Module) -> bool:
    """Whether it is refused, in one line, and then leaves the model as it is."""
    before = state(model)
    try:
        use(model)
    except FilterfoldError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert state(model) == before
    return True


def cases() -> list[tuple[str, Callable[[], nn.Module]]]:
    torch.manual_seed(0)
    groups = ff.trace(plain(), X)
    labels = {group.name: [0] + [1] * (group.size - 1) for group in groups if group.frozen is None}
    return [(ff.prune(Net(), X, keep=0.5).plan.to_json(), Net), (ff.from_clusters(groups, labels).to_json(), plain)]


def test_damaged_plans() -> None:
    rng, refused = random.Random(0), 0
    for text, factory in cases():
        model = factory().eval()
        for number in range(300):
            document = mutated(json.loads(text), rng)
            if number % 3:
                document.pop("checksum", None)  # else that is all that is looked at
            damaged = json.dumps(document) if number % 4 else scribbled(text.encode(), rng).decode(errors="replace")

            def use(model: nn.Module, damaged: str = damaged) -> None:
                plan = Plan.from_json(damaged)
                assert Plan.from_json(plan.to_json()) == plan
                hash(plan), str(plan), plan.widths
                receipt = ff.apply(plan, model)
                receipt.rollback()

            refused += tried(use, model)
    assert refused > 450


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_damaged_checkpoints(tmp_path: Path) -> None:
    rng, refused = random.Random(0), 0
    model = Net()
    plan = ff.prune(model, X, keep=0.5).plan
    ff.save(model.to(memory_format=torch.channels_last), tmp_path / "good", plan=plan, metadata={"top1": 0.5})
    save_tree(tmp_path / "tree", {"a": [torch.ones(2), (1, 2)], "b": {0: torch.zeros(1)}})
    files = [(tmp_path / name).read_bytes() for name in ("good", "tree")]
    given, path = Net(), tmp_path / "damaged"
    for number in range(450):
        raw = files[number % 9 == 8]
        header, body = header_of(raw)
        entries = header["__metadata__"]
        if number % 3 == 0:
            raw = scribbled(raw, rng)
        else:
            if number % 6 != 1:
                del entries["checksum"]
            key = rng.choice([key for key in entries if key not in ("checksum", "filterfold", "format")])
            entries[key] = json.dumps(mutated([json.loads(entries[key])], rng)) if rng.random() < 0.95 else "[" * 10**5
            if entries[key].startswith("[") and len(entries[key]) < 10**5:
                entries[key] = entries[key][1:-1] or "0"
            raw = with_header(mutated(header, rng) if number % 5 == 4 else header, body)
        path.write_bytes(raw)
        for read in (inspect, load_tree, Weights.read):
            tried(lambda _, read=read: read(path), given)  # type: ignore[misc]
        if tried(lambda model: ff.load(path, model), given):
            refused += 1
        else:
            given = Net()
    assert refused > 300


def test_flipped_bits_are_told_by_a_checksum(tmp_path: Path) -> None:
    ff.save(plain(), tmp_path / "good")
    raw = (tmp_path / "good").read_bytes()
    body = len(header_of(raw)[1])
    for place in range(len(raw) - body, len(raw), 37):
        (tmp_path / "bad").write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged: its content does not match its checksum"):
            ff.load(tmp_path / "bad", plain)


def run(units: list[list[Any]]) -> str:
    part = {"tensor": "w", "axis": 0, "units": units, "role": "filter"}
    cut = {"group": "g", "assignment": [[0, 2, 1]], "producers": [part], "consumers": []}
    return json.dumps({"format": 1, "cuts": [cut], "attributes": [], "notes": {}})


def nested(depth: int) -> str:
    return json.dumps({"format": 1, "cuts": [], "attributes": [], "notes": {}})[:-1] + ', "x": ' + "[" * depth


@pytest.mark.parametrize(
    "text",
    [
        *(run(units) for units in ([[0, 10**12, 0]], [[-1, 10**12, 1]], [[0, 10**6, 0]] * 1000, [[0, 1e12, 0]])),
        run([[0, 2, 1]]).replace("[[0, 2, 1]]", "[[1000000000000, 1, 1]]", 1),
        nested(10**5),
    ],
)
def test_a_plan_that_would_fill_the_memory_is_refused_at_once(text: str) -> None:
    tracemalloc.start()
    with pytest.raises(PlanError):
        Plan.from_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


def holding_itself() -> dict[str, Any]:
    found: dict[str, Any] = {"w": torch.ones(2)}
    found["state_dict"] = found["model"] = found
    return found


PICKLES: dict[str, Callable[[], Any]] = {
    "a state dict that holds itself": holding_itself,
    "a tensor that is a million times its storage": lambda: {"weight": torch.ones(1).expand(10**6, 10**6)},
    "a list that holds itself": lambda: (held := [], held.append(held), {"state_dict": held})[2],
    "sparse": lambda: {"weight": torch.eye(3).to_sparse()},
    "meta": lambda: {"weight": torch.empty(2, 3, device="meta")},
    "complex": lambda: {"weight": torch.ones(2, 3, dtype=torch.complex64), "bias": torch.ones(2)},
    "names that are no text": lambda: {0: torch.ones(2), (1, 2): torch.ones(2)},
}


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_state_dicts(tmp_path: Path, case: str) -> None:
    torch.save(PICKLES[case](), tmp_path / "weights.pt")
    assert tried(lambda model: ff.load_weights(model, tmp_path / "weights.pt"), nn.Linear(3, 2))
    tried(lambda _: Weights.read(tmp_path / "weights.pt").fingerprint, nn.Linear(3, 2))
