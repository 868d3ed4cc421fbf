"""Continuous batching: sequences join and leave a running batch between two decoding steps.

The batch is formed again for every token (iteration-level scheduling: Orca, OSDI 2022, section 3.1): a
sequence joins before the next step once its prompt was prefilled elsewhere, and leaves its slot with its last
token, or when it is cancelled. Each has its own settings, and gets the same tokens as alone::

    step     1   2   3   4   5   6   7
    slot 0   a   a   a   d   d   d   d     a ends at step 3, d waited and takes its slot
    slot 1   b   b   b   b   b   -   -     b ends at step 5, no sequence waits
    slot 2   -   c   c   c   c   c   -     c arrives during step 1; from step 7 on one row is computed
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...arrays import Ids
from ...bundle.spec import ComponentSpec
from ...errors import InputError, UsageError
from ...forks import renew_after_fork
from ...sampling import Sampling, StopCriteria, TokenSampler
from ..kv_cache import BatchedKVCache
from .batching import BatchResult

OnToken = Callable[[int], "bool | None"]
"""Called with each token of a sequence when it is chosen, on the scheduler's thread; True ends it."""
OnLeave = Callable[[Sequence[int], Any], None]
"""Called on that thread when a sequence leaves its slot, finished or cancelled: with its tokens that went
through the engine, and their keys and values [2, layers, heads, n, head_dim]."""


@dataclass(frozen=True)
class Started:
    """A prefilled prompt: keys and values [2, layers, heads, n, head_dim], and the logits [V] after it.

    Both are arrays, or tensors on the engine's device. ``leave`` gets those of the answer, too.
    """

    data: Any
    logits: Any
    leave: OnLeave | None = None


@dataclass(eq=False)
class _Sequence:
    sampler: TokenSampler
    on_token: OnToken | None
    leave: OnLeave | None
    prompt: int  # its positions
    future: Future[BatchResult[list[int]]] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    shared_with: int = 1


class Scheduler:
    """One thread that decodes up to ``slots`` sequences together; see the module. Close it when done.

    Args:
        run: the step engine, ``qllama_step`` or ``decoder``.
        spec: its contract.
        slots: sequences decoded at a time; others wait. No more than the engine has rows.
        inputs: of the engine, for new tokens [R, 1]; None: ``input_ids`` themselves.
    """

    def __init__(
        self,
        run: Callable[[dict[str, Any]], Mapping[str, Any]],
        spec: ComponentSpec,
        slots: int,
        inputs: Callable[[Ids], dict[str, Any]] | None = None,
    ) -> None:
        rows = spec.axis("batch").max
        if not 1 <= slots <= rows:
            raise UsageError(
                f"{slots} sequences cannot be decoded at once.", f"The engine takes 1 to {rows}."
            )
        self._run, self._spec, self._inputs = run, spec, inputs or (lambda ids: {"input_ids": ids})
        self._slots, self._closed = slots, False
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start without sequences: those of the parent are answered by the parent."""
        self._cache = BatchedKVCache(self._spec, self._slots)
        self._waiting: deque[tuple[_Sequence, Started]] = deque()
        self._running: dict[int, _Sequence] = {}  # by slot; the thread's own
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def __len__(self) -> int:
        """Sequences that wait or are decoded."""
        return len(self._waiting) + len(self._running)

    def submit(
        self,
        started: Started,
        stop: StopCriteria,
        sampling: Sampling | None = None,
        on_token: OnToken | None = None,
    ) -> Future[BatchResult[list[int]]]:
        """The tokens that follow ``started``, EOS among them if it came. Cancel the future to free the slot.

        Raises:
            InputError: the sequence may become longer than the engine's past.
            UsageError: the scheduler was closed.
        """
        prompt, past = int(started.data.shape[3]), self._spec.axis("past").max
        longest = prompt + stop.max_new_tokens - 1
        if longest > past:
            raise InputError(
                "The prompt and the answer are too long for this bundle.",
                f"They need a past of {longest} positions; the engine was built for {past}.",
                "Ask for fewer new tokens, or rebuild with a larger range.",
            )
        sequence = _Sequence(TokenSampler(stop, sampling), on_token, started.leave, prompt)
        with self._changed:
            if self._closed:
                raise UsageError("This model was closed.", fix="Load it again.")
            self._waiting.append((sequence, started))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True, name="ivl-scheduler")
                self._worker.start()
            self._changed.notify_all()
        return sequence.future

    def close(self) -> None:
        """Cancel waiting sequences, finish running ones, end the thread."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._changed.notify_all()
        for sequence, _ in waiting:
            sequence.future.cancel()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def _work(self) -> None:
        while self._wait():
            self._drop()
            self._admit()
            try:
                self._step()
            except Exception as error:  # raised by the sequences; the thread continues
                for slot in list(self._running):
                    self._leave(slot, error)

    def _wait(self) -> bool:
        """Block until there is something to decode. False: the scheduler was closed, and there is nothing."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closed:
                    return False
                self._changed.wait()
            return True

    def _drop(self) -> None:
        """Forget sequences that were cancelled."""
        with self._changed:
            self._waiting = deque(entry for entry in self._waiting if not entry[0].future.cancelled())
        for slot in [slot for slot, sequence in self._running.items() if sequence.future.cancelled()]:
            self._leave(slot)

    def _admit(self) -> None:
        """Give free slots to waiting sequences in their order, and choose their first tokens."""
        while len(self._running) < len(self._cache.lengths):
            with self._changed:
                if not self._waiting:
                    return
                sequence, started = self._waiting.popleft()
            sequence.began = time.perf_counter()
            slot = self._cache.insert(started.data)
            self._running[slot] = sequence
            self._choose(slot, started.logits)

    def _step(self) -> None:
        """One more token for all that run."""
        if not self._running:
            return
        tokens = np.zeros((self._cache.rows, 1), np.int64)
        for slot, sequence in self._running.items():
            tokens[slot] = sequence.tokens[-1]
            sequence.shared_with = max(sequence.shared_with, len(self._running))
        outputs = self._run({**self._inputs(tokens), **self._cache.feeds()})
        self._cache.append(outputs)
        for slot in list(self._running):
            self._choose(slot, outputs["logits"][slot])

    def _choose(self, slot: int, logits: Any) -> None:
        sequence = self._running[slot]
        try:
            sequence.tokens.append(sequence.sampler.choose(logits))
            ended = sequence.on_token is not None and sequence.on_token(sequence.tokens[-1])
        except Exception as error:  # its callback fails, for one
            self._leave(slot, error)
        else:
            if ended or sequence.sampler.done or sequence.future.cancelled():
                self._leave(slot)

    def _leave(self, slot: int, error: Exception | None = None) -> None:
        """Free ``slot``; its sequence is finished, has failed, or was cancelled."""
        sequence = self._running.pop(slot)
        if sequence.leave is not None and error is None:
            with suppress(MemoryError, RuntimeError):  # torch's is the latter; then it is recomputed
                data = self._cache.read_from(slot, sequence.prompt)
                sequence.leave(sequence.tokens[: data.shape[3]], data)
        self._cache.release(slot)
        if not sequence.future.set_running_or_notify_cancel():
            return
        if error is not None:
            sequence.future.set_exception(error)
            return
        waited, seconds = sequence.began - sequence.arrived, time.perf_counter() - sequence.began
        sequence.future.set_result(BatchResult(sequence.tokens, waited, seconds, sequence.shared_with))
