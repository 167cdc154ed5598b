"""What recurrent layers and attention read is cut; their own sizes stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff

from .networks import call, check, free, masked, randomise


class Reader(nn.Module):
    """A convolution, and a recurrent layer that reads it."""

    def __init__(self, layer: nn.Module, how: str = "steps first") -> None:
        super().__init__()
        self.conv, self.layer, self.how = nn.Conv1d(3, 8, 3, padding=1), layer, how
        made = getattr(layer, "proj_size", 0) or layer.hidden_size
        self.start = nn.Linear(8, made)
        self.out = nn.Linear(made * (2 if getattr(layer, "bidirectional", False) else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        if self.how == "pixels":  # two positions of every channel in each step
            n, c, length = x.shape
            x = x.view(n, c * 2, length // 2)
        if self.how == "cell":
            state, states = None, []
            for step in x.unbind(2):
                state = self.layer(step, state)
                states.append(state[0] if isinstance(state, tuple) else state)
            return self.out(torch.stack(states))
        if self.how == "one step":
            state = self.layer(x.mean(2))
            return self.out(state[0] if isinstance(state, tuple) else state)
        if self.how == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(x.transpose(1, 2), [6, 4], batch_first=True)
            return self.out(nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])
        if self.how == "batch first":
            return self.out(self.layer(x.transpose(1, 2))[0])
        first = self.start(x.mean(2))[None] if self.how == "first state" else None
        return self.out(self.layer(x.permute(2, 0, 1), first)[0])


READERS: dict[str, tuple[Any, str]] = {
    "LSTM": (lambda: nn.LSTM(8, 5), "steps first"),
    "both directions, two layers": (lambda: nn.GRU(8, 5, 2, bidirectional=True, batch_first=True), "batch first"),
    "no bias": (lambda: nn.RNN(8, 5, nonlinearity="relu", bias=False), "steps first"),
    "projected states": (lambda: nn.LSTM(8, 6, proj_size=5), "steps first"),
    "packed": (lambda: nn.LSTM(8, 5, batch_first=True), "packed"),
    "pixels": (lambda: nn.RNN(16, 5), "pixels"),
    "first state": (lambda: nn.GRU(8, 5), "first state"),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_recurrent_layer_reads_is_cut(name: str) -> None:
    build, how = READERS[name]
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert free(check(Reader(build(), how), x)) == {"conv": 8}
    model = randomise(Reader(build(), how))
    whole, states = model.layer.input_size, model.layer.hidden_size
    untouched = randomise(Reader(build(), how))
    result = ff.prune(model, x, keep=0.5, strict=True)
    torch.testing.assert_close(call(model, x), call(masked(untouched, result.plan), x))
    assert (model.layer.input_size, model.layer.hidden_size) == (whole // 2, states)
    assert model.layer.weight_ih_l0.shape[1] == whole // 2
    model.train()(x).sum().backward()


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_cut_with_their_states(kind: type[nn.RNNCellBase]) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert free(check(Reader(kind(8, 6), "cell"), x)) == {"conv": 8, "layer.weight_ih": 6}
    model = randomise(Reader(kind(8, 6), "cell"))
    ff.prune(model, x, keep=0.5, strict=True)
    assert (model.layer.input_size, model.layer.hidden_size) == (4, 3)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_that_make_their_first_state_are_cut_with_it(kind: type[nn.RNNCellBase]) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(Reader(kind(8, 6), "one step"), x)
    model = randomise(Reader(kind(8, 6), "one step"))
    ff.prune(model, x, keep=0.5, strict=True)
    assert (model.layer.input_size, model.layer.hidden_size) == (4, 3)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Conv1d(3, 12, 1), nn.Conv1d(3, 10, 1)
        self.queries = nn.Parameter(torch.randn(1, 4, 8))
        self.attend = nn.MultiheadAttention(8, 2, kdim=12, vdim=10, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (F.relu(layer(x)).transpose(1, 2) for layer in (self.keys, self.values))
        return self.out(self.attend(self.queries.expand(len(x), -1, -1), keys, values)[0])


def test_attention_reads_keys_and_values_of_other_sizes() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    model = Attending().double().eval()
    result = ff.prune(model, x, keep=0.5, strict=True)
    assert result.plan.widths == {"keys": (12, 6), "values": (10, 5), "attend.out_proj": (8, 4)}
    assert (model.attend.kdim, model.attend.vdim, model.attend.embed_dim) == (6, 5, 8)
    model.train()(x).sum().backward()
