"""`prune` and online clustering read the same options in the same way, and refuse the same mistakes alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import FilterfoldError
from filterfold.online import OnlineFilterClustering, Target
from filterfold.online.options import CutOptions
from filterfold.profiling.macs import measure
from filterfold.pruning.budgets import Selection
from filterfold.pruning.prune import prune

X = torch.randn(1, 3, 8, 8)


class Net(nn.Module):
    """A stem that a residual branch is added to, and a group in two classes (a concatenation read twice)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.body = nn.ModuleDict({"in": nn.Conv2d(20, 24, 3, padding=1), "out": nn.Conv2d(24, 20, 3, padding=1)})
        self.wide = nn.Conv2d(20, 144, 1)
        self.narrow = nn.Conv2d(144, 6, 1)
        self.padded = nn.Conv2d(6, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.body["out"](self.body["in"](x).relu())).relu()
        x = self.narrow(self.wide(x).relu()).relu()
        padding = x.new_zeros(len(x), 4, *x.shape[2:])
        x = (torch.cat((x, padding), dim=1) + self.padded(x)).relu()  # classes: with and without a shortcut
        return self.head(x.mean((2, 3)))


def widths(model: nn.Module) -> dict[str, int]:
    return {name: len(value) for name, value in model.named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize(
    ("direct", "others"),
    [
        ({"keep": 0.5}, {}),
        ({"keep": 0.37}, {"min_keep": 5}),
        ({"keep": 0.37, "round_to": 4}, {}),
        ({"keep": 0.3, "round_to": 8}, {"min_keep": 3}),
        ({"keep": 0.3, "round_to": None}, {}),
        ({"keep": {"*": 0.5, "body.in": 0.25}}, {}),
        ({"keep": {"body.in": 0.25, "*": 0.5}}, {}),  # the last pattern that matches counts
        ({"keep": {"body": 0.5}}, {}),  # a module stands for all that is in it
        ({"keep": {"body.out": 0.4, "w*": 0.2}, "round_to": 2}, {}),  # a layer coupled with the stem
        ({"keep": 0.5, "ignore": ["stem", "nar*"]}, {}),
        ({"keep": 0.5, "ignore": ["body.out"]}, {}),
        ({"keep": {"*": 0.5}, "ignore": ["body"]}, {}),
    ],
)
@pytest.mark.parametrize("method", ["l1", "fold"])
def test_the_same_options_give_the_same_widths(direct, others, method: str) -> None:
    pruned, trained = Net(), Net()
    whole = widths(pruned)
    plan = prune(pruned, X, **direct, selection=Selection(**others)).plan
    asked = {"round_to": 1} | direct
    online = OnlineFilterClustering(trained, X, method=method, target=Target(**asked, **others))
    online.cluster_and_prune()
    assert widths(pruned) == widths(trained) != whole
    if method == "l1":
        small, same = dict(pruned.named_parameters()), dict(trained.named_parameters())
        assert all(torch.equal(value, same[name]) for name, value in small.items())
    assert any(len(set(cut.assignment)) < cut.size for cut in plan.cuts)


def test_a_budget_of_macs_goes_over_all_layers_where_scores_of_layers_say_the_same() -> None:
    pruned, trained = Net(), Net()
    batches = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    prune(pruned, X, criterion="reconstruction", macs=0.5, loader=batches, selection=Selection("global"))
    online = OnlineFilterClustering(
        trained, X, method="reconstruction", macs=0.5, round_to=1, cutting=CutOptions(loader=batches)
    )
    online.cluster_and_prune()
    small, same = dict(pruned.named_parameters()), dict(trained.named_parameters())
    assert all(torch.equal(value, same[name]) for name, value in small.items())

    stepwise = Net()
    whole = measure(stepwise, X).macs
    online = OnlineFilterClustering(
        stepwise, X, method="reconstruction", macs=0.5, round_to=1, cutting=CutOptions(loader=batches)
    )
    for share, least in ((0.5, 0.7), (1.0, 0.45)):
        online.cluster_and_prune(share)
        assert least * whole < measure(stepwise, X).macs <= (1 - share / 2) * whole


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1.5},
        {"keep": 0},
        {"keep": True},
        {"keep": float("nan")},
        {"keep": "half"},
        {"keep": {}},
        {"keep": {"stem": 2.0}},
        {"keep": {"stern": 0.5}},
        {"macs": float("nan")},
        {"macs": True},
        {"macs": 1e-6},
        {"keep": 0.5, "macs": 0.5},
        {"keep": 0.5, "round_to": 0},
        {"keep": 0.5, "round_to": True},
        {"keep": 0.5, "round_to": 1.5},
        {"keep": 0.5, "ignore": "stem"},
        {"keep": 0.5, "ignore": ["stern"]},
        {"keep": 0.5, "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)},
        {"keep": 0.5, "optimizer": "sgd"},
    ],
    ids=str,
)
def test_the_same_mistakes_are_refused_alike(options) -> None:
    said = []
    for verb in (prune, OnlineFilterClustering):
        model = Net()
        with pytest.raises(FilterfoldError) as caught:
            verb(model, X, **options)
        said.append((type(caught.value), str(caught.value).removeprefix(f"{verb.__qualname__}: ")))
        assert widths(model) == widths(Net())
    if options == {"macs": 1e-6}:  # how narrow groups may get is not the same
        said = [(kind, text.rpartition(" ")[0]) for kind, text in said]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters=0: must be a whole number of at least 1"),
        ({"clusters": 1.5}, "OnlineFilterClustering: clusters=1.5 must be int or Mapping[str, int] or None"),
        ({"clusters": True}, "OnlineFilterClustering: clusters=True must be int or Mapping[str, int] or None"),
        ({"clusters": {}}, "clusters={} names no layer: give at least one, such as {'*': ...}"),
        ({"threshold": 0.9, "round_to": 4}, "round_to= has no effect with threshold=: leave it out"),
        ({"keep": 0.5, "target": Target(keep=0.4)}, "keep= is given directly and in Target: give it once"),
        ({"keep": 0.5, "method": "l1", "pull": "centripetal"}, "pull='centripetal' has no effect with method='l1'"),
    ],
)
def test_what_online_clustering_alone_can_be_asked(options, message: str) -> None:
    with pytest.raises(FilterfoldError) as caught:
        OnlineFilterClustering(Net(), X, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.5, "selection": Selection(scope="global")}, "scope= has no effect with latency="),
        ({"keep": 0.5, "verify": False, "strict": True}, "strict=True has no effect with verify=False"),
        ({"keep": 0.5, "round_to": 2, "selection": Selection(round_to=4)}, "round_to= is given directly and in Selec"),
    ],
)
def test_what_prune_alone_can_be_asked(options, message: str) -> None:
    with pytest.raises(FilterfoldError) as caught:
        prune(Net(), X, **options)
    assert str(caught.value).startswith(message)
