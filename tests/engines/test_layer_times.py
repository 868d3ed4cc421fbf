"""Times of an engine's layers as one shape for all backends."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.engines.layer_times import Event, TimedCall, concatenate_calls
from ivl_export.engines.tensorrt.layer_names import layer_names
from ivl_export.engines.tensorrt.profile import profiled_calls
from ivl_export.tests.verify.test_inspector import ELEVEN, TEN, vit_layers

TIMES = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(st.tuples(TIMES, st.lists(st.tuples(TIMES, TIMES), max_size=4)), max_size=4))
def test_calls_of_parts_are_consecutive(parts: list[tuple[float, list[tuple[float, float]]]]) -> None:
    calls = [TimedCall(us, tuple(Event("x", "y", start, length) for start, length in ev)) for us, ev in parts]
    whole = concatenate_calls(calls)
    assert whole.us == sum(call.us for call in calls)
    assert [e.us for e in whole.events] == [e.us for call in calls for e in call.events]
    begin = 0.0
    events = iter(whole.events)
    for call in calls:
        for event in call.events:
            assert next(events).start_us == event.start_us + begin
        begin += call.us


@pytest.mark.parametrize("style", [TEN, ELEVEN])
def test_layers_are_named_by_the_nodes_they_compute(style: dict[str, Any]) -> None:
    layers = vit_layers(style)
    names = layer_names(json.dumps({"Layers": layers}))
    assert names[layers[1]["Name"]] == ("gemm", ("attn.qkv", "attn.qkv/dq", "attn.qkv/wdq", "attn.qkv/t"))
    for text in ("", "[]", '{"Layers": 3}', '{"Layers": ["names", "only"]}', "[" * 100_000):
        assert layer_names(text) == {}


def test_an_engines_layers_follow_each_other() -> None:
    layers = vit_layers(ELEVEN)
    runs = [(2.0, [(layers[1]["Name"], 0.5), ("Reformat 7", 0.25), (layers[5]["Name"], 1.0)])]
    engine = SimpleNamespace(
        layers=lambda: json.dumps({"Layers": layers}), profiled=lambda inputs, calls: (runs * calls, {"y": 1})
    )
    calls, outputs = profiled_calls(cast(Any, engine), {}, 2)
    assert outputs == {"y": 1}
    assert len(calls) == 2
    assert calls[0].us == 2000
    assert calls[0].events == (
        Event("attn.qkv", "gemm", 0, 500),
        Event("Reformat 7", "", 500, 250),
        Event("attn/sdpa", "kgen", 750, 1000),
    )
