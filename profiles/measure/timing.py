"""Timing one call: warm-up, then windows of calls until the latest windows agree, or a limit is reached.

A window's median hardly moves with single disturbances; when the medians of the latest windows agree within
``tolerance``, caches are warm and clocks have settled. Statistics are taken over the agreeing windows at the
end (over all samples if they never agreed, which the result says). All raw samples are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

Clock = Callable[[], int]
Ended = Literal["stable", "time limit", "sample limit"]


@dataclass(frozen=True)
class StopRule:
    """When a measurement ends.

    Args:
        seconds: limit of the measured part; a call that has begun is finished, and one is always made.
        tolerance: how far the medians of the latest windows may differ, relative to the smallest.
        windows: how many of them must agree.
        window_calls: least calls of a window.
        window_share: least length of a window, as a share of ``seconds`` (or ``max_window_calls`` calls).
        max_window_calls: most calls of a window.
        min_samples: least calls in the windows that agree, so that p99 means something; as far as the limit
            allows.
        max_samples: most calls kept.
        warmup_calls, warmup_share: calls made before, fewer once that share of ``seconds`` has passed.
    """

    seconds: float = 3.0
    tolerance: float = 0.02
    windows: int = 3
    window_calls: int = 3
    window_share: float = 0.05
    max_window_calls: int = 500
    min_samples: int = 100
    max_samples: int = 10_000
    warmup_calls: int = 5
    warmup_share: float = 0.2


@dataclass(frozen=True)
class Summary:
    """Statistics of samples, in milliseconds. Percentiles interpolate between neighbouring samples."""

    samples: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


@dataclass(frozen=True)
class Measurement:
    """One call, timed.

    Args:
        samples_ns: every call after the warm-up, in order.
        window_sizes: how many of them each window has; the last one may have been cut off by a limit.
        steady_from: index of the first sample that counts.
        ended: why it ended; only ``stable`` means that the windows agreed: those at its end, of fewer calls
            than requested if the limit came first.
        warmup_calls: calls made before.
    """

    samples_ns: tuple[int, ...]
    window_sizes: tuple[int, ...]
    steady_from: int
    ended: Ended
    warmup_calls: int

    @property
    def stable(self) -> bool:
        """Whether the latest windows agreed."""
        return self.ended == "stable"

    @property
    def summary(self) -> Summary:
        """Statistics of the samples that count."""
        return summarize(self.samples_ns[self.steady_from :])

    def throughput(self, items: float) -> float:
        """Items per second of back-to-back calls that handle ``items`` each."""
        return items * 1e3 / self.summary.mean_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data: statistics and raw samples."""
        return {
            "summary": vars(self.summary),
            "stable": self.stable,
            "ended": self.ended,
            "warmup_calls": self.warmup_calls,
            "steady_from": self.steady_from,
            "window_sizes": list(self.window_sizes),
            "samples_ns": list(self.samples_ns),
        }


def summarize(samples_ns: Sequence[int]) -> Summary:
    """Statistics of at least one sample in nanoseconds."""
    values = np.asarray(samples_ns, dtype=np.float64) / 1e6
    p50, p90, p95, p99 = (float(p) for p in np.percentile(values, (50, 90, 95, 99)))
    least, most = float(values.min()), float(values.max())
    # Summation rounds: the mean of equal values must not leave their range.
    mean = min(max(float(values.mean()), least), most)
    return Summary(len(values), mean, p50, p90, p95, p99, least, most)


def measure(
    call: Callable[[], object],
    rule: StopRule | None = None,
    clock: Clock = time.perf_counter_ns,
    after_warmup: Callable[[], object] | None = None,
    sample: Callable[[], int] | None = None,
) -> Measurement:
    """Time ``call`` until ``rule`` (the default one if None) ends it.

    Args:
        call: the call to time; each is one sample.
        rule: when to stop.
        clock: nanoseconds, monotonic.
        after_warmup: called once between warm-up and the first sample.
        sample: makes the call and says its nanoseconds (a GPU's own timer); None: ``clock`` around the call.
            Limits go by ``clock`` in any case.
    """
    rule, sample = rule or StopRule(), sample or partial(_sample, call, clock)
    warmup = _warm_up(call, rule, clock)
    if after_warmup is not None:
        after_warmup()
    samples: list[int] = []
    sizes: list[int] = []
    medians: list[float] = []
    steady = 0
    start = clock()
    limit = start + round(rule.seconds * 1e9)
    ended: Ended | None = None
    while ended is None:
        ended = _window(sample, rule, clock, limit, samples)
        sizes.append(len(samples) - sum(sizes))
        medians.append(float(np.median(samples[-sizes[-1] :])))
        # A window that a limit cut off takes no part in the verdict.
        whole = len(medians) - (ended is not None)
        agree = whole >= rule.windows and _agree(medians[whole - rule.windows : whole], rule.tolerance)
        steady = _steady_from(medians[:whole], sizes[:whole], rule) if agree else 0
        if agree and (ended is not None or len(samples) - steady >= rule.min_samples):
            ended = "stable"
    return Measurement(tuple(samples), tuple(sizes), steady, ended, warmup)


def _warm_up(call: Callable[[], object], rule: StopRule, clock: Clock) -> int:
    start, calls = clock(), 0
    while calls < rule.warmup_calls:
        call()
        calls += 1
        if clock() - start >= rule.warmup_share * rule.seconds * 1e9:
            break
    return calls


def _sample(call: Callable[[], object], clock: Clock) -> int:
    begin = clock()
    call()
    return clock() - begin


def _window(
    sample: Callable[[], int], rule: StopRule, clock: Clock, limit: int, samples: list[int]
) -> Ended | None:
    """Append one window to ``samples``; the limit that cut it off, if one did."""
    first, calls = clock(), 0
    while True:
        samples.append(sample())
        end = clock()
        calls += 1
        long_enough = end - first >= rule.window_share * rule.seconds * 1e9 or calls >= rule.max_window_calls
        if end >= limit:
            return "time limit"
        if len(samples) >= rule.max_samples:
            return "sample limit"
        if calls >= rule.window_calls and long_enough:
            return None


def _agree(medians: Sequence[float], tolerance: float) -> bool:
    return max(medians) <= min(medians) * (1 + tolerance)


def _steady_from(medians: list[float], sizes: list[int], rule: StopRule) -> int:
    """The first sample of the longest run of windows at the end that agree with each other."""
    count = rule.windows
    while count < len(medians) and _agree(medians[-count - 1 :], rule.tolerance):
        count += 1
    return sum(sizes[:-count])
