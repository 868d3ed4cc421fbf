"""Tokens are chosen on the logits' device, with the same results as on the host."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.arrays import Ids
from ivl_export.sampling import Sampling, Scores, StopCriteria, decode, sample_token

torch = pytest.importorskip("torch")

SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
)


@given(how=SETTINGS, size=st.integers(1, 300), ties=st.booleans())
@pytest.mark.slow
def test_a_device_draws_what_the_host_draws(how: Sampling, size: int, ties: bool) -> None:
    drawn = np.random.default_rng(how.seed).normal(0, 3, size).astype(np.float32)
    logits = np.round(drawn) if ties else drawn
    suppressed = (how.seed % size, size - 1) if size > 2 else ()
    own, other = np.random.default_rng(how.seed), np.random.default_rng(how.seed)
    for _ in range(5):
        token = sample_token(torch.from_numpy(logits), how, own, suppressed)
        assert token == sample_token(logits, how, other, suppressed)
        assert token not in suppressed
    assert sample_token(logits, how, own) == sample_token(logits, how, other)


@pytest.mark.slow
def test_shares_are_those_of_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.3, 0.15])
    rng = np.random.default_rng(0)
    for how, want in (
        (Sampling(1.0), [0.05, 0.5, 0.3, 0.15]),
        (Sampling(1.0, top_k=2), [0, 0.625, 0.375, 0]),
        (Sampling(1.0, top_p=0.7), [0, 0.625, 0.375, 0]),
        (Sampling(1.0, top_p=0.01), [0, 1, 0, 0]),
    ):
        drawn = [sample_token(probabilities.log(), how, rng) for _ in range(4000)]
        assert [drawn.count(i) / len(drawn) for i in range(4)] == pytest.approx(want, abs=0.03)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_of_any_float_type(kind: str) -> None:
    logits = torch.tensor([0.0, 3.0, 1.0]).to(getattr(torch, kind))
    assert sample_token(logits, Sampling(), np.random.default_rng(0)) == 1
    assert sample_token(logits, Sampling(), np.random.default_rng(0), (1,)) == 2
    assert logits[1] == 3, "the engine's own logits stay"


def test_beams_end_at_every_stop_token() -> None:
    """As one end token of all their probability would: a beam that ended is not continued."""
    table = np.log(np.array([[0.05, 0.1, 0.6, 0.25], [0.7, 0.1, 0.1, 0.1]], np.float32))

    def step(tokens: Ids, rows: Ids | None) -> Scores:
        return np.stack([table[1 if token == 3 else 0] for token in tokens])

    kinds = (StopCriteria(1, 0, 3), StopCriteria(1, 0, 3, more=(2,)))
    plain, more = (decode(table[:1], step, stop, 2)[0].tolist() for stop in kinds)
    assert plain == [2, 2, 2]
    assert more == [1], "token 2, the likeliest, ends the first beam: nothing precedes it"
    never = StopCriteria(1, 0, 3, never=(2,))
    assert 2 not in decode(table[:1], step, never, 2)[0].tolist()
    assert decode(table[:1], step, StopCriteria(1, 0, 2, 1, (2,)), 1)[0].tolist() == [3, 0]
