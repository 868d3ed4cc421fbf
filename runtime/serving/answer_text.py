"""The text of an answer, token by token: trimmed, and ended by a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...inputs.chat_template import AnswerTokens, ChatTemplate
from ...inputs.tokenizer import Pieces, Tokenizer


class AnswerText:
    """The text of one answer. All that :meth:`add` and :meth:`rest` return, joined, has no outer white space.

    Args:
        tokenizer, template: of the checkpoint.
        ends: whether a token ends the answer.
        stop: texts that end it; they are not part of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        ends: Callable[[int], bool],
        stop: Sequence[str] = (),
    ) -> None:
        self._pieces, self._answer = Pieces(tokenizer), AnswerTokens(tokenizer, template)
        self._ends, self._stop = ends, tuple(text for text in stop if text)
        self._held, self._begun = "", False
        self.stopped = False

    def add(self, token: int) -> str:
        """The characters that are sure with ``token``: what may begin a stop string is held back."""
        if self.stopped or self._ends(token) or not self._answer.add(token):
            return ""
        self._held += self._pieces.add(token)
        if not self._begun:
            self._held = self._held.lstrip()
        places = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if places:
            self.stopped = True
            self._held = self._held[: min(places)]
            return self.rest()
        sure = self._held[: len(self._held) - self._doubtful()].rstrip()
        self._held = self._held[len(sure) :]
        self._begun |= bool(sure)
        return sure

    def rest(self) -> str:
        """The characters that were held back, at the answer's end."""
        text, self._held = self._held.rstrip(), ""
        return text

    def _doubtful(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        ends = (n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n]))
        return max(ends, default=0)
