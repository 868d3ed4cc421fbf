"""Token search: greedy, sampling and beam, over any function that turns tokens into logits.

Shared by the PyTorch model and the runtime, so that both choose the same tokens. Beam search keeps the
semantics of ``transformers`` 4.37 (length_penalty 1, early_stopping False), which the published captions were
made with.

A token is chosen on the device of the logits: by numpy on the host, by torch on a device, from which only the
token's id is copied. The random number of a draw comes from numpy in both cases, so that both draw the same
tokens from the same logits, up to rounding. Torch is imported only for logits that are tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .arrays import Ids
from .errors import UsageError

if TYPE_CHECKING:
    import torch

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from softmax(logits / temperature), cut to its likeliest part.

    Args:
        temperature: 0 takes the likeliest token always.
        top_k: of how many tokens at most; 0: all.
        top_p: of the fewest tokens that have this probability together.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                "These sampling settings cannot be right.",
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}.",
                "temperature and top_k are 0 or more, top_p is over 0 and at most 1.",
            )


@cache
def _unused_generator() -> np.random.Generator:
    """For greedy choices, which draw nothing; made late, because numpy.random is slow to import."""
    return np.random.default_rng(0)


class StepFunction(Protocol):
    """Advance every row by one token."""

    def __call__(self, tokens: Ids, rows: Ids | None) -> Scores:
        """Tokens [R] continue the caches of ``rows`` [R] (None: each its own) -> logits [R, V]."""
        ...


@dataclass(frozen=True)
class StopCriteria:
    """When a sequence ends: at the token ``eos`` or one of ``more``, or at ``max_new_tokens``.

    Before ``min_new_tokens`` tokens these are suppressed; ``pad`` fills rows that ended before others.
    ``never`` are tokens that are never chosen: image placeholders.
    """

    eos: int
    pad: int = 0
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    more: tuple[int, ...] = ()
    never: tuple[int, ...] = ()

    def ends(self, token: int) -> bool:
        """Whether a sequence ends with ``token``."""
        return token == self.eos or token in self.more

    def suppressed(self, produced: int) -> tuple[int, ...]:
        """Tokens that may not follow ``produced`` new ones."""
        ends = (self.eos, *self.more) if produced < self.min_new_tokens else ()
        return (*self.never, *(token for token in ends if token >= 0))


def decode(
    first: Scores,
    step: StepFunction,
    stop: StopCriteria,
    num_beams: int = 1,
    sampling: Sampling | None = None,
) -> Ids:
    """New token ids [B, <= max_new_tokens] of B prompts, ``pad`` after each row's EOS.

    Args:
        first: logits [B, V] after the prompt.
        step: advances the rows; with beams it is called with B * num_beams rows, the first time with each
            prompt's row repeated.
        stop: token ids and lengths.
        num_beams: 1 is greedy, or as ``sampling`` says.
        sampling: how tokens are drawn, for each row as if it were alone. None: the likeliest.

    Raises:
        UsageError: settings that cannot be right, or beams that would be sampled.
    """
    check_search(stop, num_beams, sampling)
    if num_beams > 1:
        return _beam(first, step, stop, num_beams)
    return np.stack(list(stream(first, step, stop, sampling)), 1)


def stream(
    first: Scores, step: StepFunction, stop: StopCriteria, sampling: Sampling | None = None
) -> Iterator[Ids]:
    """The next token of every prompt [B], step by step: the columns of :func:`decode` without beams."""
    check_search(stop, 1, sampling)
    samplers = [TokenSampler(stop, sampling) for _ in first]
    logits = first
    while True:
        rows = zip(samplers, logits, strict=True)
        tokens = np.array([stop.pad if s.done else s.choose(row) for s, row in rows], np.int64)
        yield tokens
        if all(sampler.done for sampler in samplers):
            return
        logits = step(tokens, None)


def check_search(stop: StopCriteria, num_beams: int, sampling: Sampling | None) -> None:
    """UsageError for settings that cannot be right."""
    if num_beams < 1 or not 0 <= stop.min_new_tokens <= stop.max_new_tokens >= 1:
        raise UsageError(
            "These generation settings cannot be right.",
            f"num_beams {num_beams}, max_new_tokens {stop.max_new_tokens}, "
            f"min_new_tokens {stop.min_new_tokens}.",
            "num_beams and max_new_tokens are 1 or more, min_new_tokens is 0 to max_new_tokens.",
        )
    if num_beams > 1 and sampling is not None:
        raise UsageError("Beams are not sampled.", f"num_beams is {num_beams}.", "Give one of the two.")


class TokenSampler:
    """Chooses one sequence's tokens, one after another; ``done`` after the last one."""

    def __init__(self, stop: StopCriteria, sampling: Sampling | None = None) -> None:
        self.stop, self.sampling = stop, sampling or Sampling()
        self.done, self._count = False, 0
        greedy = self.sampling.temperature == 0  # takes no number, and a generator takes time to make
        self._rng = _unused_generator() if greedy else np.random.default_rng(self.sampling.seed)

    def choose(self, logits: Any) -> int:
        """The next token, from the ``logits`` [V] (an array, or a tensor) after the tokens before it."""
        suppressed = self.stop.suppressed(self._count)
        token = sample_token(logits, self.sampling, self._rng, suppressed)
        self._count += 1
        self.done = self.stop.ends(token) or self._count == self.stop.max_new_tokens
        return token


def sample_token(
    logits: Any, sampling: Sampling, rng: np.random.Generator, suppressed: Sequence[int] = ()
) -> int:
    """One token of ``logits`` [V], an array or a tensor on any device; none of the tokens ``suppressed``."""
    if not isinstance(logits, np.ndarray):
        return _sample_on_device(logits, sampling, rng, suppressed)
    if suppressed:
        logits = logits.copy()
        logits[list(suppressed)] = -np.inf
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    count = 1 + int(np.searchsorted(weights.cumsum(), sampling.top_p))  # the fewest that make top_p
    mass = weights[:count].cumsum()
    index = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return int(order[min(index, len(mass) - 1)])


def _sample_on_device(
    logits: Any, sampling: Sampling, rng: np.random.Generator, suppressed: Sequence[int]
) -> int:
    import torch
    from torch.utils.dlpack import from_dlpack

    scores = (logits if isinstance(logits, torch.Tensor) else from_dlpack(logits)).detach().float()
    if suppressed:
        scores = scores.clone()
        scores[list(suppressed)] = -np.inf
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(_draw(scores, sampling, rng.random()))


def _draw(scores: torch.Tensor, sampling: Sampling, number: float) -> torch.Tensor:
    """The token [] at ``number`` in [0, 1) of the cut distribution's cumulative function."""
    import torch

    ranked, order = scores.sort(descending=True, stable=True)
    ranked, order = (
        ranked[: sampling.top_k or None].double() / sampling.temperature,
        order[: sampling.top_k or None],
    )
    mass = torch.exp(ranked - ranked[0]).cumsum(0)
    last = (mass < sampling.top_p * mass[-1]).sum().clamp(max=len(mass) - 1)  # of the fewest that make top_p
    index = (mass <= number * mass.take(last)).sum().minimum(last)
    return order.take(index)


def _beam(first: Scores, step: StepFunction, stop: StopCriteria, beams: int) -> Ids:
    batch, vocab = first.shape
    finished = [_Finished(beams) for _ in range(batch)]
    closed = np.zeros(batch, bool)
    tokens = np.zeros((batch * beams, 0), np.int64)
    # All beams of a prompt start equal: only the first may be continued, or the beams would be copies.
    totals = np.full((batch, beams), -1e9, np.float32)
    totals[:, 0] = 0
    logits = np.repeat(first, beams, 0)
    candidates = (2 + len(stop.more)) * beams  # so that ``beams`` are left if all that end are among them
    rows = np.repeat(np.arange(batch), beams)
    while True:
        length = tokens.shape[1] + 1
        scores = _suppress(_log_softmax(logits), tokens.shape[1], stop)
        scores = (scores + totals.reshape(-1, 1)).reshape(batch, beams * vocab)
        ranked = _top(scores, candidates)
        parents = np.zeros((batch, beams), np.int64)
        chosen = np.full((batch, beams), stop.pad, np.int64)
        totals = np.zeros((batch, beams), np.float32)
        for b in range(batch):
            if closed[b]:
                continue
            slot = 0
            for rank, flat in enumerate(ranked[b]):
                beam, token = divmod(int(flat), vocab)
                score = scores[b, flat]
                if stop.ends(token):
                    if rank < beams:
                        finished[b].add(tokens[b * beams + beam], float(score), length)
                    continue
                parents[b, slot], chosen[b, slot], totals[b, slot] = beam, token, score
                slot += 1
                if slot == beams:
                    break
            closed[b] = finished[b].closed(float(scores[b, ranked[b, 0]]), length)
        source = (np.arange(batch)[:, None] * beams + parents).reshape(-1)
        tokens = np.concatenate([tokens[source], chosen.reshape(-1, 1)], axis=1)
        if closed.all() or length == stop.max_new_tokens:
            break
        logits = step(tokens[:, -1], rows if length == 1 else source)
    for b in range(batch):
        for beam in range(0 if closed[b] else beams):
            finished[b].add(tokens[b * beams + beam], float(totals[b, beam]), length)
    best = [f.best() for f in finished]
    width = min(max(len(t) for t in best) + 1, stop.max_new_tokens)
    out = np.full((batch, width), stop.pad, np.int64)
    for b, ids in enumerate(best):
        out[b, : len(ids)] = ids
        if len(ids) < width:
            out[b, len(ids)] = stop.eos
    return out


@dataclass
class _Finished:
    """The best ``size`` finished hypotheses of one prompt; scores are mean log-probabilities."""

    size: int
    hypotheses: list[tuple[float, Ids]] = field(default_factory=list)

    def add(self, tokens: Ids, total: float, length: int) -> None:
        self.hypotheses.append((total / length, tokens))
        self.hypotheses.sort(key=lambda h: h[0])
        del self.hypotheses[: -self.size]

    def closed(self, best_open: float, length: int) -> bool:
        """Whether no open beam can still beat the worst one kept."""
        return len(self.hypotheses) == self.size and self.hypotheses[0][0] >= best_open / length

    def best(self) -> Ids:
        return self.hypotheses[-1][1]


def _suppress(scores: Scores, produced: int, stop: StopCriteria) -> Scores:
    tokens = stop.suppressed(produced)
    if not tokens:
        return scores
    scores = scores.copy()
    scores[..., list(tokens)] = -np.inf
    return scores


def _top(scores: Scores, count: int) -> Ids:
    """Indices [B, count] of each row's highest scores, best first, equal ones in their order."""
    if count >= scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    best = np.sort(np.argpartition(-scores, count, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def _log_softmax(logits: Scores) -> Scores:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
