"""Two profiles compared: noise gives no verdict, a real change does, and the gate names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export import cli
from ivl_export.errors import InputError
from ivl_export.profiles.measure.receipt import write
from ivl_export.profiles.report.diff import MIN_CHANGE, diff, ratio_interval
from ivl_export.tests.profiles.made_profiles import made_case, made_profile


def noisy(seed: int, level: float = 10.0, count: int = 200) -> list[float]:
    """Times with outliers, and slow spells in which neighbours are slow together."""
    generator = np.random.default_rng(seed)
    spells = np.repeat(generator.exponential(0.04, -(-count // 10)), 10)[:count]
    outliers = generator.random(count) < 0.02
    return list(level * (1 + spells + generator.exponential(0.02, count) + 3 * outliers))


def ns(ms: list[float]) -> list[int]:
    return [round(value * 1e6) for value in ms]


@pytest.mark.slow
def test_noise_alone_fails_no_gate() -> None:
    intervals = [ratio_interval(ns(noisy(seed)), ns(noisy(seed + 1000))) for seed in range(60)]
    assert sum(low > 1.05 or high < 1 / 1.05 for low, high in intervals) == 0
    covers = sum(low <= 1 <= high for low, high in intervals)
    assert covers >= 50  # of 60 at 95%, blocks and all


def test_a_change_is_seen_through_the_noise() -> None:
    for seed in range(20):
        low, high = ratio_interval(ns(noisy(seed)), ns(noisy(seed + 1000, level=12.0)))
        assert 1.1 < low <= high < 1.3


@given(st.lists(st.integers(1000, 10**9), min_size=1, max_size=50), st.floats(0.5, 2.0))
def test_the_interval_scales_and_repeats(samples: list[int], factor: float) -> None:
    scaled = [max(1, round(factor * s)) for s in samples]
    low, high = ratio_interval(samples, scaled)
    assert low <= high
    assert (low, high) == ratio_interval(samples, scaled)
    if len(set(samples)) == 1:
        assert low == pytest.approx(factor, rel=1e-2)


def test_every_verdict() -> None:
    names = ("same", "slower", "faster", "unclear")
    steady = [10.0] * 100
    wild = list(np.random.default_rng(0).choice([5.0, 20.0], 101))
    old = made_profile([made_case(name, steady) for name in names])
    new = made_profile(
        [
            made_case("same", [10.1] * 100),
            made_case("slower", [10.5] * 100),
            made_case("faster", [9.0] * 100),
            made_case("unclear", wild, stable=False),
        ]
    )
    difference = diff(old, new, fail_above=0.04)
    assert [change.verdict for change in difference.changes] == list(names)
    assert [change.name for change in difference.failed] == ["slower"]
    assert [change.steady for change in difference.changes] == [True, True, True, False]
    assert difference.changes[1].ratio == pytest.approx(1.05)
    assert diff(old, new, fail_above=0.06).failed == ()
    assert diff(old, new).failed == ()
    assert diff(old, old).changes[0].low >= 1 - MIN_CHANGE
    json.dumps(difference.to_json(), allow_nan=False)


def test_only_steady_samples_count() -> None:
    slow_start = made_case(samples_ms=[50.0] * 30 + [10.0] * 100, steady_from=30)
    (change,) = diff(made_profile([made_case(samples_ms=[10.0] * 100)]), made_profile([slow_start])).changes
    assert (change.verdict, change.ratio) == ("same", 1.0)


def test_what_else_changed_is_said() -> None:
    old = made_profile([made_case(), made_case("gone")])
    new = made_profile(
        [made_case(), made_case(batch=8)],
        subject=replace(old.subject, manifest_sha256="1" * 64, recipe="int8"),
        versions={"python": "3.12.0", "torch": "2"},
    )
    difference = diff(old, new)
    assert difference.only_old == ("component gone, batch 1",)
    assert difference.only_new == ("component vision, batch 8",)
    assert "recipe: fp8 -> int8" in difference.differences
    assert "python: 3.11.0 -> 3.12.0" in difference.differences
    assert "torch: none -> 2" in difference.differences
    with pytest.raises(InputError, match="no case in common"):
        diff(old, made_profile([made_case("other")]))


def test_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, level in (("a", 10.0), ("b", 10.2), ("c", 13.0)):
        profile = made_profile([made_case(samples_ms=noisy(3, level))])
        write(profile.to_json(), tmp_path / f"{name}.json")
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert cli.main(["compare", a, b, "--fail-above", "5%"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", a, c, "--fail-above", "5%"]) == 9
    captured = capsys.readouterr()
    assert "slower" in captured.out
    assert "1 of 1 cases are slower by more than 5%" in captured.err
    assert cli.main(["compare", a, c, "--fail-above", "50"]) == 0
    assert cli.main(["compare", c, a]) == 0
    assert "faster" in capsys.readouterr().out
    assert cli.main(["compare", a, c, "--json", "--fail-above", "5%"]) == 9
    assert json.loads(capsys.readouterr().out)["failed"][0]["verdict"] == "slower"
    for bad in ("much", "-1", "nan"):
        assert cli.main(["compare", a, c, "--fail-above", bad]) == 2
    assert cli.main(["compare", a, str(tmp_path / "no.json")]) == 3


def test_only_receipts_have_times(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt, bundle = str(tmp_path / "a.json"), str(tiny_bundle)
    write(made_profile([made_case()]).to_json(), tmp_path / "a.json")
    assert cli.main(["compare", receipt, bundle]) == 2
    assert "A bundle and a receipt" in capsys.readouterr().err
    assert cli.main(["compare", bundle, bundle, "--fail-above", "5%"]) == 2
    assert "profile BUNDLE --out RECEIPT" in capsys.readouterr().err
    assert cli.main(["compare", bundle, str(tmp_path / "none")]) == 8
