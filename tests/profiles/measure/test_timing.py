"""The timing loop against a clock that the test drives: samples, stopping, report."""

from __future__ import annotations

from itertools import chain, repeat
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.profiles.measure.timing import Measurement, StopRule, measure, summarize

MS = 1_000_000


class Workload:
    """A call that takes the next of given times, and its clock."""

    def __init__(self, *durations_ns: object) -> None:
        self.now = 0
        self.calls = 0
        self._durations = chain.from_iterable(d if hasattr(d, "__iter__") else [d] for d in durations_ns)

    def clock(self) -> int:
        return self.now

    def __call__(self) -> None:
        self.now += next(self._durations)
        self.calls += 1

    def measure(self, rule: StopRule) -> Measurement:
        return measure(self, rule, self.clock)


@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_summary_is_ordered_exact_and_blind_to_order(samples: list[int], random: object) -> None:
    s = summarize(samples)
    assert s.min_ms <= s.p50_ms <= s.p90_ms <= s.p95_ms <= s.p99_ms <= s.max_ms
    assert s.min_ms <= s.mean_ms <= s.max_ms
    assert s.samples == len(samples)
    assert s.p50_ms == pytest.approx(median(samples) / 1e6, rel=1e-12)
    assert s.p99_ms == pytest.approx(float(np.quantile(samples, 0.99)) / 1e6, rel=1e-9)
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarize(shuffled).p90_ms == s.p90_ms


def test_percentiles_of_a_hundred_and_one_known_times() -> None:
    s = summarize([n * MS for n in range(101)])
    assert (s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms, s.mean_ms) == (50, 90, 95, 99, 50)


def test_a_constant_call_is_stable_as_soon_as_it_may_be() -> None:
    work = Workload(repeat(1 * MS))
    result = work.measure(StopRule(seconds=1.0, warmup_calls=5))
    assert result.ended == "stable"
    assert result.stable
    assert result.warmup_calls == 5
    # windows of 50 ms, at least 3 of them and 100 samples
    assert result.window_sizes == (50, 50, 50)
    assert result.steady_from == 0
    assert result.summary.p99_ms == 1.0
    assert result.throughput(8) == pytest.approx(8000.0)
    assert work.calls == 155


def test_a_call_that_keeps_getting_slower_is_never_stable() -> None:
    result = Workload(int(MS * 1.02**n) for n in range(10_000)).measure(StopRule(seconds=2.0))
    assert result.ended == "time limit"
    assert not result.stable
    assert result.steady_from == 0  # no part of it can be preferred
    assert result.summary.samples == len(result.samples_ns)


def test_a_slow_start_is_kept_but_does_not_count() -> None:
    two_windows = 34  # of 50 ms each, after 5 calls of warm-up
    result = Workload(repeat(3 * MS, 5 + two_windows), repeat(1 * MS)).measure(StopRule(seconds=1.0))
    assert result.stable
    assert result.samples_ns[0] == 3 * MS
    assert result.summary.p99_ms == 1.0
    assert result.summary.mean_ms == 1.0
    assert all(s == MS for s in result.samples_ns[result.steady_from :])


def test_the_steady_part_is_the_longest_that_agrees() -> None:
    # one sample decides nothing: rare outliers stay in the statistics of a stable call
    pattern = [1 * MS] * 39 + [20 * MS]
    result = Workload(pattern * 500).measure(StopRule(seconds=2.0))
    assert result.stable
    assert result.steady_from == 0
    assert result.summary.p50_ms == 1.0
    assert result.summary.max_ms == 20.0


@given(
    st.lists(st.integers(1, 400 * MS), min_size=1, max_size=30),
    st.floats(0.05, 2.0),
)
def test_limits_hold_for_any_times(durations: list[int], seconds: float) -> None:
    rule = StopRule(seconds=seconds, max_samples=500)
    work = Workload(*repeat(durations, 1000))
    result = work.measure(rule)
    total, last = sum(result.samples_ns), result.samples_ns[-1]
    assert 1 <= len(result.samples_ns) <= rule.max_samples
    assert total - last < seconds * 1e9 + 1  # only the call that had begun goes past the limit
    assert sum(result.window_sizes) == len(result.samples_ns)
    assert work.calls == len(result.samples_ns) + result.warmup_calls
    limited = total >= round(seconds * 1e9) or len(result.samples_ns) == rule.max_samples
    if result.ended == "time limit":
        assert total >= round(seconds * 1e9)
    if result.stable:
        counted = len(result.samples_ns) - result.steady_from
        assert result.summary.samples == counted
        assert limited or counted >= rule.min_samples
        ends = np.cumsum(result.window_sizes)
        assert result.steady_from in {0, *ends.tolist()}
        windows = [
            (e - n, e) for e, n in zip(ends, result.window_sizes, strict=True) if e > result.steady_from
        ]
        steady = [np.median(result.samples_ns[begin:end]) for begin, end in windows]
        least = len(steady) - limited  # the window that the limit cut off has no say
        assert least >= rule.windows
        assert max(steady[:least]) <= min(steady[:least]) * (1 + rule.tolerance)


def test_slow_calls_that_agree_are_stable_with_fewer_samples() -> None:
    rule = StopRule(seconds=1.0)
    result = Workload(repeat(40 * MS)).measure(rule)
    assert result.stable
    assert len(result.samples_ns) == 25 < rule.min_samples
    assert result.steady_from == 0
    few = Workload(repeat(150 * MS)).measure(rule)  # two windows of three calls, and a part of one
    assert few.ended == "time limit"


def test_very_fast_calls_stop_at_the_sample_limit() -> None:
    drifting = chain.from_iterable(repeat(1000 * 2**n, 500) for n in range(30))
    result = Workload(drifting).measure(StopRule(seconds=60.0, max_samples=2_000, warmup_calls=0))
    assert result.ended == "sample limit"
    assert len(result.samples_ns) == 2_000


def test_a_call_longer_than_the_limit_is_measured_once() -> None:
    work = Workload(repeat(10_000 * MS))
    result = work.measure(StopRule(seconds=1.0))
    assert result.warmup_calls == 1
    assert result.samples_ns == (10_000 * MS,)
    assert result.ended == "time limit"


def test_the_hook_runs_between_warm_up_and_samples() -> None:
    work = Workload(repeat(1 * MS))
    seen: list[int] = []
    rule = StopRule(seconds=0.5)
    measure(work, rule, work.clock, lambda: seen.append(work.calls))
    assert seen == [rule.warmup_calls]


def test_json_keeps_the_raw_samples() -> None:
    result = Workload(repeat(2 * MS)).measure(StopRule(seconds=1.0))
    data = result.to_json()
    assert data["samples_ns"] == [2 * MS] * len(result.samples_ns)
    assert data["summary"]["p50_ms"] == 2.0
    assert data["stable"] is True


def test_a_real_clock_and_a_real_call() -> None:
    calls = []
    result = measure(lambda: calls.append(sum(range(1000))), StopRule(seconds=0.05))
    assert len(calls) == len(result.samples_ns) + result.warmup_calls
    assert result.summary.min_ms > 0
