from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.calibration.search import Group, Option, as_recipe, line, search
from ivl_export.quantization.recipe import schemes

NUMBERS = st.integers(1, 50)


@st.composite
def some_groups(draw: st.DrawFn) -> list[Group]:
    results = []
    for i in range(draw(st.integers(1, 4))):
        options = [Option("bf16", float(draw(NUMBERS)), 0.0)]
        options += [Option(s, float(draw(NUMBERS)), float(draw(NUMBERS))) for s in ("fp8", "int8")]
        results.append(Group((f"a.{i}.x", f"a.{i}.y"), tuple(options)))
    return results


@given(some_groups())
def test_no_other_recipe_is_faster_with_as_little_noise(groups: list[Group]) -> None:
    recipes = line(groups)
    sums = [(sum(o.ms for o in picks), sum(o.noise for o in picks)) for picks in recipes]
    assert sums == sorted(sums, key=lambda s: (s[0], -s[1])), "slower, and with less noise, along the line"
    assert sums[0][0] == sum(min(o.ms for o in g.options) for g in groups)
    assert sums[-1][1] == 0
    for other in itertools.product(*(g.options for g in groups)):
        ms, noise = sum(o.ms for o in other), sum(o.noise for o in other)
        assert not any(ms < own - 1e-9 and noise <= limit for own, limit in sums)


@given(groups=some_groups(), budget=st.integers(0, 200))
def test_the_fastest_within_the_budget(groups: list[Group], budget: int) -> None:
    noise = {(layer, o.scheme): o.noise / 2 for g in groups for o in g.options for layer in g.layers}
    measured = []

    def lost(result: dict[str, str]) -> float:
        measured.append(result)
        return sum(noise[item] for item in result.items())

    result = search(groups, "bf16", budget, lost)
    recipes = line(groups)
    losses = [sum(o.noise for o in picks) for picks in recipes]
    assert result.place == next(i for i, loss in enumerate(losses) if loss <= budget)
    assert sum(noise[item] for item in result.schemes.items()) == pytest.approx(losses[result.place])
    assert len(measured) <= math.ceil(math.log2(len(recipes) + 1)) + 1
    assert result.fastest_ms <= result.ms <= result.base_ms + 1e-9
    assert [c.layers for c in result.choices] == [g.layers for g in groups]
    assert result == search(groups, "bf16", budget, lost), "deterministic"


def test_reasons() -> None:
    groups = [
        Group(("quiet",), (Option("bf16", 4, 0), Option("fp8", 2, 1e-4), Option("int8", 1, 1e-1))),
        Group(("loud",), (Option("bf16", 4, 0), Option("fp8", 2, 0.5))),
        Group(("slow",), (Option("bf16", 4, 0), Option("fp8", 5, 1e-4))),
    ]
    result = search(
        groups, "bf16", 0.05, lambda s: 0.01 * len(s) + ("loud" in s) + (s.get("quiet") == "int8")
    )
    assert result.schemes == {"quiet": "fp8"}
    quiet, loud, slow = (choice.reason for choice in result.choices)
    assert quiet == "saves 2 ms of 4, at 40.0 dB; int8 would save 1 more, at 10.0 dB"
    assert loud == "fp8 would save 2 ms, but at 3.0 dB"
    assert slow == "no scheme is faster"


@given(st.lists(st.sampled_from(["bf16", "fp8", "int8"]), min_size=6, max_size=6))
def test_it_is_an_ordinary_recipe(chosen: list[str]) -> None:
    layers = [f"tower.layers.{i}.{part}" for i in range(3) for part in ("fc1", "fc2")]
    by_name = {layer: scheme for layer, scheme in zip(layers, chosen, strict=True) if scheme != "bf16"}
    recipe = as_recipe("mixed", by_name, [*layers, "head"], "bf16", "")
    assert schemes(recipe, [*layers, "head"]) == {**dict(zip(layers, chosen, strict=True)), "head": "bf16"}
