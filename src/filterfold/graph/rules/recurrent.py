"""Rules for recurrent layers (LSTM, GRU, RNN), for whole and for packed sequences: what they read can shrink."""

from __future__ import annotations

from typing import Any

from ..dispatch import Call, Tracer
from ..labels import FIXED
from . import rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(tracer: Tracer, call: Call) -> Any:
    """The first layer reads the inputs, in one or two directions; states stay as many as they are."""
    packed = call["input"] is None
    layout, weights = tracer.layout(call["data"] if packed else call["input"]), list(call["params"])
    directions = 2 if call["bidirectional"] else 1
    each = len(weights) // (directions * int(call["num_layers"]))
    for columns in (tracer.layout(weights[each * direction])[1] for direction in range(directions)):
        tracer.table.assign(columns, "kernel")
        tracer.table.join_axes([layout[-1], columns], call.site)
    given = call["hx"] if isinstance(call["hx"], list | tuple) else [call["hx"]]
    for state in given:
        tracer.freeze(tracer.layout(state), f"the first state of {call.site}")
    states = [(FIXED,) * tensor.ndim for tensor in call.outputs[1:]]
    return [(*layout[:-1], FIXED), *states]


@rule("_pack_padded_sequence")
def pack(tracer: Tracer, call: Call) -> Any:
    """The steps of all sequences in one axis."""
    return [(FIXED, *tracer.layout(call["input"])[2:]), (FIXED,)]


@rule("_pad_packed_sequence")
def pad(tracer: Tracer, call: Call) -> Any:
    """Sequences of one length again."""
    return [(FIXED, FIXED, *tracer.layout(call["data"])[1:]), (FIXED,)]
