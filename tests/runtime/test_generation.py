"""Decoding over the step contract equals the published tokens, with the PyTorch model as the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.errors import InputError
from ivl_export.runtime.captions import generate_tokens, pad_prompts
from ivl_export.runtime.kv_cache import GRAIN, KVCache, next_capacity
from ivl_export.sampling import StopCriteria

TINY = Path(__file__).parents[1] / "goldens" / "tiny"
STOP = StopCriteria(eos=2, pad=0, max_new_tokens=30, min_new_tokens=8)


def step_spec(
    layers: int, heads: int, width: int, vocab: int, text: int = 8, past: int = 64
) -> ComponentSpec:
    ints = [("input_ids", "text"), ("positions", "text")]
    inputs = [TensorSpec(name, "int64", ("batch", axis)) for name, axis in ints]
    inputs.append(TensorSpec("attention_mask", "int64", ("batch", "visible")))
    for kind in ("past_key", "past_value"):
        inputs += [TensorSpec(f"{kind}.{i}", "float", ("batch", heads, "past", width)) for i in range(layers)]
    axes = (Axis("batch", 1, 1, 64), Axis("text", 1, 1, text), Axis("past", 1, 16, past))
    outputs = (TensorSpec("logits", "float", ("batch", vocab)),)
    return ComponentSpec("qllama_step", tuple(inputs), outputs, (*axes, Axis("visible", 1, 16, past + text)))


class Tiny:
    """The tiny golden model with the engines' contract."""

    def __init__(self) -> None:
        torch = pytest.importorskip("torch")
        from safetensors.numpy import load_file

        from ivl_export.models import load_model
        from ivl_export.models.generate import text_step

        self.torch, self.text_step = torch, text_step
        self.model = load_model(TINY, dtype=torch.float32, device="cpu")
        self.golden = load_file(TINY / "generate.safetensors")
        self.facts = json.loads((TINY / "generate.json").read_text())
        config = self.model.config.qllama
        self.layers = config.num_hidden_layers
        self.spec = step_spec(self.layers, config.num_attention_heads, config.head_dim, config.vocab_size)
        self.calls: list[dict[str, tuple[int, ...]]] = []

    def queries(self, pixels: Any) -> dict[str, np.ndarray[Any, Any]]:
        with self.torch.no_grad():
            _, past = self.model.query_pass(self.model.vision(self.torch.from_numpy(pixels)))
        return self.named(past)

    def named(self, pairs: Any) -> dict[str, np.ndarray[Any, Any]]:
        out = {}
        for i, (key, value) in enumerate(pairs):
            out[f"key.{i}"], out[f"value.{i}"] = key.numpy(), value.numpy()
        return out

    def run(self, feeds: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        assert set(feeds) == {t.name for t in self.spec.inputs}
        assert all(a.flags.c_contiguous for a in feeds.values())  # no engine has to copy
        self.calls.append({name: a.shape for name, a in feeds.items()})
        t = {name: self.torch.from_numpy(a) for name, a in feeds.items()}
        past = [(t[f"past_key.{i}"], t[f"past_value.{i}"]) for i in range(self.layers)]
        with self.torch.no_grad():
            logits, new = self.text_step(
                self.model, t["input_ids"], t["positions"], t["attention_mask"], past
            )
        return {"logits": logits.numpy(), **self.named(new)}


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny()


def prompt(tiny: Tiny, which: str) -> tuple[Any, Any, Any]:
    g = tiny.golden
    return g["pixel_values"], g[f"{which}_input_ids"], g[f"{which}_attention_mask"]


@pytest.mark.parametrize("which", ["nopad", "leftpad", "rightpad"])
def test_greedy_equals_the_published_tokens(tiny: Tiny, which: str) -> None:
    pixels, ids, mask = prompt(tiny, which)
    stop = StopCriteria(eos=2, pad=0, max_new_tokens=10)
    out = generate_tokens(tiny.run, tiny.spec, tiny.queries(pixels), ids, mask, stop)
    assert out.tolist() == tiny.facts[which]["new_tokens"]


def test_beam_search_equals_the_published_tokens(tiny: Tiny) -> None:
    pixels, ids, mask = prompt(tiny, "nopad")
    out = generate_tokens(tiny.run, tiny.spec, tiny.queries(pixels), ids, None, STOP, num_beams=5)
    assert out.tolist() == tiny.facts["beam5_min8_max30_batch3_new_tokens"]
    greedy = generate_tokens(tiny.run, tiny.spec, tiny.queries(pixels), ids, mask, STOP)
    assert greedy.tolist() == tiny.facts["greedy_min8_max30_new_tokens"]


def test_long_prompts_are_prefilled_in_pieces(tiny: Tiny) -> None:
    pixels, ids, mask = prompt(tiny, "leftpad")
    narrow = step_spec(tiny.layers, 4, 16, 200, text=2)
    stop = StopCriteria(eos=2, pad=0, max_new_tokens=10)
    tiny.calls.clear()
    out = generate_tokens(tiny.run, narrow, tiny.queries(pixels), ids, mask, stop)
    assert out.tolist() == tiny.facts["leftpad"]["new_tokens"]
    assert max(call["input_ids"][1] for call in tiny.calls) == 2
    assert len({call["past_key.0"] for call in tiny.calls}) == 1  # one shape in every step


def test_left_padding_does_not_change_an_answer(tiny: Tiny) -> None:
    pixels = prompt(tiny, "nopad")[0][:2]
    stop = StopCriteria(eos=2, pad=0, max_new_tokens=12)
    prompts = [[1, 7, 9, 30, 41], [1, 7]]
    ids, mask = pad_prompts(prompts)
    both = generate_tokens(tiny.run, tiny.spec, tiny.queries(pixels), ids, mask, stop)
    for row, one in enumerate(prompts):
        alone = generate_tokens(
            tiny.run, tiny.spec, tiny.queries(pixels[row : row + 1]), np.array([one]), None, stop
        )
        assert both[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_too_long_for_the_engine_is_refused_before_it_runs(tiny: Tiny) -> None:
    pixels, ids, mask = prompt(tiny, "nopad")
    stop = StopCriteria(eos=2, pad=0, max_new_tokens=60)
    with pytest.raises(InputError, match="past of"):
        generate_tokens(fail, tiny.spec, tiny.queries(pixels), ids, mask, stop)
    with pytest.raises(InputError, match="prompt"):
        generate_tokens(fail, tiny.spec, tiny.queries(pixels), ids[:, :0], mask[:, :0], stop)
    with pytest.raises(InputError, match="prompt"):
        generate_tokens(fail, tiny.spec, tiny.queries(pixels[:1]), ids, mask, stop)


def fail(feeds: Any) -> Any:
    raise AssertionError("the engine must not run")


def random_positions(rng: np.random.Generator) -> Callable[[int], dict[str, Any]]:
    def draw(count: int) -> dict[str, Any]:
        names = [f"{kind}.{i}" for kind in ("key", "value") for i in range(2)]
        return {name: rng.standard_normal((3, 2, count, 4)).astype(np.float32) for name in names}

    return draw


def test_capacity_of_the_documented_example() -> None:
    past = Axis("past", 1, 1, 4096)
    assert next_capacity(1025, 1024, past) == 1152
    assert [next_capacity(needed, 1152, past) for needed in (1152, 513, 512)] == [1152, 1152, 512]


def test_cache_reorders_as_fancy_indexing_does() -> None:
    draw = random_positions(np.random.default_rng(0))
    queries = {name: np.repeat(a[:1], 3, 0) for name, a in draw(2).items()}  # one image, three beams
    cache = KVCache.of_queries(queries, layers=2, capacity=6)
    new = draw(3)
    cache.append(new, np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]]))
    source = np.array([2, 0, 0])
    cache.reorder(source)
    for i in range(2):
        want = np.concatenate([queries[f"key.{i}"], new[f"key.{i}"][source], np.zeros((3, 2, 1, 4))], 2)
        assert np.array_equal(cache.feeds()[f"past_key.{i}"], want)
    assert cache.mask.tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    with pytest.raises(ValueError, match="7 positions"):
        cache.append(draw(2), np.ones((3, 2), np.int64))


@given(st.integers(1, 40), st.integers(0, 3000), st.lists(st.integers(1, 2000), min_size=1, max_size=20))
@pytest.mark.slow
def test_a_capacity_follows_what_is_used(least: int, more: int, lengths: list[int]) -> None:
    past, have = Axis("past", least, least, max(2000, least + more)), 0
    for longest in lengths:
        have = next_capacity(longest, have, past)
        assert max(longest, least) <= have <= past.max
        assert have < max(least, 2 * (longest + longest // 8 + GRAIN))
        assert have == next_capacity(longest, have, past)
    copied = 0
    for longest in range(have, past.max):
        if (room := next_capacity(longest, have, past)) != have:
            copied, have = copied + longest, room
    assert copied <= 10 * past.max, "in proportion to the positions written"
