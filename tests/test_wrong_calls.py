"""Calls that make no sense: each is refused at once, in one line, with the project's error, and changes nothing.

One table: function → arguments that make sense, and for each of its options values that make none. A value that is a
`Made` is made when it is needed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold import data
from filterfold.errors import FilterfoldError
from filterfold.online import CutOptions, Distillation, OnlineFilterClustering, Pull, Schedule, Target, shrink
from filterfold.training import Recipe

NAN, INF = float("nan"), float("inf")
X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 3))


class Exits(nn.Module):
    """Ends the process, as if all were well."""

    def forward(self, x: Tensor) -> Tensor:
        sys.exit(0)


class Made:
    """A value that is made anew for its call."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class Once(Made):
    """A value that takes long to make, and is not changed where it is refused."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(cache(make))


def sparse() -> nn.Module:
    model = net()
    model[6].weight = nn.Parameter(model[6].weight.detach().to_sparse())
    return model


def pruned() -> nn.Module:
    model = net()
    ff.apply(PLAN, model)
    return model


def of_another_network() -> torch.optim.Optimizer:
    return torch.optim.SGD(net().parameters(), 0.1)


PLAN = ff.prune(net(), X, keep=0.5).plan
GROUPS = ff.trace(net(), X)
SCORES = ff.score(GROUPS, net())
COST = ff.measure(net(), X)
DIGITS = data.load("digits").train

SHARE = [0, 0.0, -0.1, 1.5, NAN, INF, True, "half", [], {}, [0.5], 1j]
SHARES = [*SHARE, {"nowhere": 0.5}, {"0": 1.5}, {"0": NAN}, {3: 0.5}, {"0": None}]
COUNT = [0, -1, 1.5, True, "2", NAN, INF, [], {}, [1]]
WORD = ["banana", 3, True, [], {}, ""]
SEED = ["a", 1.5, True, NAN, []]
FLAG = ["yes", 2, [], NAN]
NAMES = ["conv", 3, [3], {"a": 1}, ["nowhere"], True]
NUMBER = [-1, NAN, INF, "a", True, []]
NO_MODEL = [
    None,
    "resnet",
    3,
    nn.Linear,
    lambda x: x,
    [nn.ReLU()],
    Made(lambda: torch.export.export(net().eval(), (X,))),
]
SCRIPTED = [
    Made(lambda: torch.jit.script(net())),
    Made(lambda: torch.jit.trace(net().eval(), X)),
    Made(lambda: torch.jit.freeze(torch.jit.script(net().eval()))),
]
MODEL = [
    *(*NO_MODEL, *SCRIPTED, Exits(), Made(sparse), Made(lambda: net().to("meta"))),
    Made(lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 4, 3))),
]
INPUT = [
    *(None, "x", 3, torch.zeros(1, 3, 6, 6), torch.zeros(6), [], (), {}, {"nope": X}, {3: X}, [X], X.long()),
    *(torch.full((2, 1, 6, 6), NAN), torch.full((2, 1, 6, 6), INF), torch.zeros(0, 1, 6, 6), X.to("meta")),
    torch.zeros(1, 1, 6, 6, dtype=torch.complex64),
]
OPTIMIZER = [
    *("sgd", 3, torch.optim.SGD, {"a": 1}, True, Made(of_another_network), Made(lambda: [of_another_network(), 3])),
    Made(lambda: [of_another_network()]),
]
AVERAGED = [3, "ema", [3], Made(lambda: nn.Linear(2, 2)), Made(lambda: [nn.Linear(2, 2)])]
LOADER = [3, [], [None], ["x"], True, [torch.zeros(2, 3, 6, 6)], [{"a": X}], Made(lambda: iter(()))]
INFINITE = [[torch.full((2, 1, 6, 6), NAN)]]
BUDGET = {"macs": [*SHARE, 1e-9], "parameters": SHARE, "latency": SHARE}
CRITERION = ["banana", 3, None, [], True]


def given(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {name: value.make() if isinstance(value, Made) else value for name, value in options.items()}


ONE = given(model=Made(net), example_inputs=X)
TWO = given(pruned=Made(pruned), original=Made(net), plan=PLAN)
ONLINE = given(model=Made(net), example_inputs=X, keep=0.5, schedule=Schedule.gradual(10))


def online(call: str) -> Callable[..., Any]:
    return lambda **options: getattr(OnlineFilterClustering(**ONLINE()), call)(**options)


def without_schedule(epoch: int) -> None:
    OnlineFilterClustering(net(), X, keep=0.5).step(epoch)


def entered(**options: Any) -> None:
    with ff.masked(**options):
        pass


def first(make: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    return lambda **options: next(iter(make(**options)))


Options = Mapping[str, list[Any]]
TABLE: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], Options]] = {
    "prune": (ff.prune, lambda: ONE() | {"keep": 0.5}, {
        "model": MODEL, "example_inputs": INPUT, "keep": SHARES, "criterion": CRITERION, "scope": WORD,
        "round_to": COUNT, "min_keep": [0, -1, True, "2", NAN, [], 1.5, INF], "max_cut": SHARE, "ignore": NAMES,
        "optimizer": OPTIMIZER, "averaged": AVERAGED, "selection": [3, "global", {}, ff.Scoring()],
        "scoring": [3, "greedy", {}], "verify": FLAG, "strict": FLAG, "macs": [0.5], "parameters": [0.5],
        "latency": [0.5],
    }),
    "prune to a budget": (ff.prune, ONE, BUDGET),
    "options without effect": (lambda options: ff.prune(net(), X, **options), dict, {"options": [
        {}, {"latency": 0.5, "scope": "global"}, {"latency": 0.5, "scope": "banana"},
        {"keep": {"0": 0.5}, "scope": "global"}, {"keep": 0.5, "verify": False, "strict": True},
        {"macs": 0.5, "scoring": ff.Scoring("greedy")}, {"keep": 0.5, "criterion": "taylor"},
        {"keep": 0.5, "scoring": ff.Scoring("greedy"), "scope": "global"},
        {"keep": 0.5, "criterion": "taylor", "loader": [X]}, {"keep": 0.5, "criterion": "reconstruction"},
        {"keep": 0.5, "scope": "global", "selection": ff.Selection(round_to=2), "round_to": 4},
    ]}),
    "trace": (ff.trace, ONE, {"model": MODEL, "example_inputs": INPUT}),
    "measure": (ff.measure, ONE, {"model": [*NO_MODEL, Exits()], "example_inputs": INPUT}),
    "select": (ff.select, given(groups=GROUPS, scores=SCORES, keep=0.5), {
        "groups": [None, 3, ["a"], [3], "abc"], "keep": SHARES, "scope": WORD, "round_to": COUNT, "max_cut": SHARE,
        "min_keep": [0, -1, True, "2", NAN, 1.5], "ignore": NAMES, "normalize": WORD, "cost": [3, "x", {}],
        "scores": [None, {}, 3, {**SCORES, "0": torch.ones(3)}, {**SCORES, "0": torch.full((8,), NAN)},
                   {**SCORES, "0": [1] * 8}],
    }),
    "select a budget": (ff.select, given(groups=GROUPS, scores=SCORES, cost=COST),
                        {"macs": [*SHARE, 1e-9], "parameters": SHARE}),
    "score": (ff.score, given(groups=GROUPS, model=Made(net)), {
        "groups": [None, 3, ["a"], "abc"], "model": NO_MODEL, "criterion": [*CRITERION, "taylor"], "combine": WORD,
        "follow": WORD, "batches": COUNT, "loss": [3, "ce"], "seed": SEED, "without": [3, "plan"], "loader": [3],
    }),
    "score by data": (
        ff.score, given(groups=GROUPS, model=Made(net), criterion="taylor", loader=[(X, torch.tensor([0, 1]))]),
        {"loader": [*LOADER, [X]], "batches": COUNT, "loss": [3, "ce", lambda out, _: out, lambda *_: 3]},
    ),
    "apply": (ff.apply, given(plan=PLAN, model=Made(net)), {
        "plan": [None, 3, "plan", {}, PLAN.to_json()], "optimizer": OPTIMIZER, "averaged": AVERAGED, "cache": [3],
        "model": [*NO_MODEL, *SCRIPTED, *MODEL[-2:], Made(lambda: nn.Linear(2, 2)), Made(pruned)],
    }),
    "verify": (ff.verify, lambda: TWO() | {"example_inputs": X}, {
        "pruned": NO_MODEL, "original": NO_MODEL, "plan": [None, 3, "p"], "example_inputs": INPUT, "groups": [3, ["a"]],
        "tolerance": [-1, NAN, "a", True, []],
    }),
    "masked": (entered, given(model=Made(net), plan=PLAN), {
        "model": [*NO_MODEL, Made(lambda: nn.Linear(2, 2)), Made(pruned)], "plan": [None, 3, "p"],
    }),
    "repair": (ff.repair, lambda: TWO() | {"loader": [X]}, {
        "pruned": [*NO_MODEL, Made(net)], "original": [*NO_MODEL, Made(pruned)], "plan": [None, 3], "batches": COUNT,
        "loader": LOADER + INFINITE, "ridge": [0, *NUMBER],
    }),
    "reestimate": (ff.reestimate, given(model=Made(net), loader=[X]),
                   {"model": NO_MODEL, "loader": LOADER + INFINITE, "batches": COUNT}),
    "from_clusters": (ff.from_clusters, given(groups=GROUPS, labels={"0": [0] * 8}), {
        "groups": [None, 3, ["a"]],
        "labels": [None, 3, {"nowhere": [0]}, {"6": [0, 0, 0]}, *(
            {"0": wrong} for wrong in ([0], "abc", None, [0.5] * 8, [-1] * 8, torch.zeros(8), [True] * 8, ["a"] * 8)
        )],
    }),
    "save": (ff.save, given(model=Made(net), path="new"), {
        "model": [*NO_MODEL, *SCRIPTED, Made(sparse), *MODEL[-2:]], "path": [None, 3, ".", "a.safetensors/x"],
        "plan": [3, "p", [3], {}], "metadata": [3, "a", {"a": object()}, [1]],
    }),
    "load": (ff.load, given(path="a.safetensors", factory=Made(net)), {
        "path": [None, 3, ".", "none"], "factory": [None, 3, "x", lambda: 3], "device": ["banana", 3.5, [], True],
    }),
    "load_weights": (ff.load_weights, given(model=Made(net), path="a.safetensors"), {
        "model": [*NO_MODEL, Made(lambda: nn.Linear(2, 2)), Made(lambda: net().to("meta"))],
        "path": [None, 3, ".", "none"], "new_head": FLAG,
    }),
    "measure_latency": (
        ff.measure_latency, given(models={"a": net()}, example_inputs=X, batch_sizes=(1,), repeats=1), {
            "models": [None, 3, {}, [net()], {"a": 3}, {"A/A control": net()}, {3: net()}], "example_inputs": INPUT,
            "batch_sizes": [(), 0, (0,), (1.5,), ("a",), (-1,), (True,), 3], "mode": WORD, "threads": COUNT,
            "repeats": COUNT, "warmup": [-1, "a", 1.5, NAN, True], "block_seconds": [0, *NUMBER],
            "max_seconds": [-1, NAN, "a", True], "timer": [3],
        },
    ),
    "OnlineFilterClustering": (OnlineFilterClustering, ONLINE, {
        "model": MODEL, "example_inputs": INPUT, "optimizer": OPTIMIZER, "keep": SHARES, "clusters": [0.5],
        "threshold": [0.5], "macs": [0.5], "round_to": COUNT, "ignore": NAMES, "target": [3, "x", {}],
        "schedule": ["gradual", 3, {}, [], True, (1, 2)], "pull": WORD, "method": WORD, "averaged": AVERAGED,
        "cutting": [3, "x", {}],
    }),
    "its budgets": (OnlineFilterClustering, ONE, {
        "clusters": [*COUNT, {"nowhere": 3}, {"0": 0}, {"0": True}], "macs": [*SHARE, 1e-9],
        "threshold": [-2, 2, NAN, INF, "a", True, [], {}],
    }),
    "step": (online("step"), given(done=1), {"done": [-1, 1.5, "a", True, NAN, None], "metric": ["a", [], True]}),
    "step without a schedule": (without_schedule, dict, {"epoch": [1]}),
    "cluster_and_prune": (online("cluster_and_prune"), dict, {"share": SHARE}),
    "Target": (Target, given(keep=0.5), {"keep": SHARE, "min_keep": COUNT, "round_to": COUNT, "clusters": [3]}),
    "Pull": (Pull, dict, {"kind": WORD, "strength": NUMBER}),
    "CutOptions": (CutOptions, dict, {
        "features": WORD, "remedy": [*WORD, "norms"], "seed": SEED, "verify": FLAG, "loader": [3],
    }),
    "Selection": (ff.Selection, dict, {
        "scope": WORD, "round_to": COUNT, "min_keep": [0, -1, NAN, True, "a", 1.5, []], "ignore": [3, [3], True],
        "normalize": [*WORD, "max"], "max_cut": SHARE,
    }),
    "Scoring": (ff.Scoring, dict, {"order": WORD, "follow": WORD, "seed": SEED}),
    "LatencyBudget": (ff.LatencyBudget, given(share=0.5), {
        "share": [*SHARE, None], "batch_size": COUNT, "mode": WORD, "threads": COUNT, "repeats": COUNT, "rounds": COUNT,
        "folder": [3, True], "timer": [3],
    }),
    **{f"Schedule.{name}": (getattr(Schedule, name), given(epochs=10), {
        "epochs": [*COUNT, None], "steps": [10], "every": COUNT,
    }) for name in ("gradual", "early", "document")},
    "Schedule.plateau": (Schedule.plateau, given(epochs=10), {
        "epochs": [*COUNT, None], "patience": COUNT, "change": [-1, 1, NAN, INF, "a", True],
    }),
    "Schedule.small_cuts": (Schedule.small_cuts, given(epochs=10), {
        "epochs": COUNT, "every": [*COUNT, 100], "start": [-1, 1, NAN, "a", True, 0.6], "end": [0, 2, NAN, "a"],
        "power": [0, *NUMBER],
    }),
    "Schedule.every": (Schedule.every, given(n=1, start=1, stop=3, milestones=(4,)), {
        "n": COUNT, "start": [-1, 1.5, "a", NAN, 4], "stop": [-1, 1.5, "a"],
        "milestones": [3, ("a",), (1.5,), (3, 2), (NAN,), "ab"],
    }),
    "Schedule.at_fractions": (Schedule.at_fractions, given(milestones=[(0.5, 1.0)], epochs=10), {"milestones": [
        [], 3, [(0.5, 0.5)], [(1.5, 1.0)], [(NAN, 1.0)], [(0.5, NAN)], [0.5], "ab", [("a", 1.0)], [(0.5, 2.0)],
        [(0.6, 0.5), (0.3, 1.0)], [(0.5, 0.0), (0.6, 1.0)],
    ]}),
    "Schedule": (Schedule, dict, {
        "updates": [3, ("a",), (1.5,), (-1,), (NAN,), (True,)], "patience": COUNT, "change": [-1, 1, NAN, "a", True],
        "milestones": [3, ((1, 0.5),), (("a", 1.0),), ((1.5, 1.0),), ((1, NAN),), ((2, 0.5), (1, 1.0)), (1,)],
        "unit": WORD,
    }),
    "Schedule.of": (Schedule.of, given(schedule="gradual", epochs=10), {
        "schedule": [*WORD, "1.5", "0.5,0.2", "nan", "small-cuts", None, {"milestones": 3}, NAN], "epochs": COUNT,
    }),
    "Distillation": (Distillation, given(model=Made(net)), {
        "model": NO_MODEL, "temperature": [0, *NUMBER], "weight": [-1, 2, NAN, "a", True, []], "student": [3],
        "losses": ["banana", 3, {}, [], {"a": "banana"}, True], "in_training": ["nowhere", ["nowhere"], 3, [3]],
        "features": ["0", 3, ["nowhere"], {"0": -1}, {"0": NAN}, [3], {"0": "a"}],
    }),
    "its features": (Distillation, given(model=Made(net), features=["2"], example_inputs=X), {
        "features": [{"2": -1}, {"2": NAN}, {"2": True}], "example_inputs": INPUT, "student": [3],
    }),
    "shrink": (first(shrink), lambda: ONE() | {"macs": [0.5], "calibration": [X]}, {
        "model": MODEL, "example_inputs": INPUT, "calibration": LOADER, "batches": COUNT, "criterion": ["banana", 3],
        "macs": [[], [0.5, 0.5], [0], [1.5], [NAN], ["a"], 3, "ab", 0.5, [True], [None], [1e-9]], "selection": [3],
        "scoring": [3], "remedy": WORD, "strict": FLAG, "distillation": [3], "train": [3],
    }),
    "Recipe": (Recipe, dict, {
        **dict.fromkeys(("epochs", "batch_size", "step_every"), COUNT),
        **{name: [*NUMBER, 1] for name in ("momentum", "warmup", "label_smoothing", "ema")},
        **{name: [*NUMBER, 0] for name in ("lr", "step_factor", "head_lr")},
        **dict.fromkeys(("weight_decay", "clip"), NUMBER),
        **dict.fromkeys(("schedule", "precision", "optimizer"), WORD),
        **dict.fromkeys(("nesterov", "decay_norms", "channels_last", "compile", "deterministic"), FLAG),
        **dict.fromkeys(("cuda_graphs", "freeze_norms"), FLAG),
        "augment": [3, True], "seed": SEED, "validate_every": [-1, 1.5, True, "a", NAN],
    }),
    "data.load": (data.load, given(source="digits"), {
        "source": [3, None, "./nowhere", ""], "image_size": COUNT, "channels": [0, 2, -1, "a", True, 1.5],
        "validation": [-1, 1.5, NAN, "a", True, 10**9, -0.1], "train_limit": [*COUNT, 5], "augment": WORD,
        "normalization": ["banana", 3, (), ([0], [0]), ([0], [NAN]), ([0, 0], [1, 1]), ([NAN], [1]), (["a"], [1])],
        "memory_limit": [-1, "a", NAN, True], "workers": [-1, "a", 1.5, True], "seed": SEED,
    }),
    "data.batches": (first(data.batches), given(split=DIGITS, batch_size=4), {
        "split": [3, None], "batch_size": COUNT, "augment": WORD, "seed": SEED, "epoch": ["a", 1.5],
        "device": ["banana", []], "dtype": ["float", 3],
    }),
    "to_program": (ff.to_program, ONE, {"model": [*NO_MODEL, Exits()], "example_inputs": INPUT[:6], "path": [3, "."]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of TorchScript, which is deprecated
@pytest.mark.parametrize("name", TABLE)
def test_a_call_that_makes_no_sense_is_refused(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments, options = TABLE[name]
    monkeypatch.chdir(tmp_path)
    ff.save(net(), "a.safetensors")
    wrong = []
    for option, values in options.items():
        for value in values:
            call = arguments() | {option: value.make() if isinstance(value, Made) else value}
            model = call.get("model") if option != "model" else None
            before = copy.deepcopy(model)
            try:
                function(**call)
                wrong.append((option, value, "accepted"))
            except FilterfoldError as error:
                if "\n" in str(error):
                    wrong.append((option, value, str(error)))
            except BaseException as error:
                wrong.append((option, value, repr(error)))
            if isinstance(model, nn.Module) and not _equal(model, before):
                wrong.append((option, value, "changed"))
    assert wrong == []


def _equal(one: nn.Module, two: Any) -> bool:
    states = one.state_dict(), two.state_dict()
    return states[0].keys() == states[1].keys() and all(map(torch.equal, *(state.values() for state in states)))


def test_there_are_many_of_them() -> None:
    assert sum(len(values) for _, _, options in TABLE.values() for values in options.values()) > 1_500


def test_every_call_that_is_meant_as_sensible_is_accepted(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ff.save(net(), "a.safetensors")
    for name, (function, arguments, _) in TABLE.items():
        call = arguments()
        if name == "prune to a budget" or name == "select a budget" or name == "its budgets":
            call["macs"] = 0.5
        if not name.startswith(("options", "step without", "measure_latency")):
            function(**call)
