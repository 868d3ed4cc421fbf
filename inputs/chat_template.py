"""Conversations in the format of InternVL-Chat: LLaVA 1.5's prompt for Vicuna v1.5. No torch.

    SYSTEM USER: <image>
    what is this? ASSISTANT: a ring</s>USER: and its color? ASSISTANT: red</s>

Texts stand between special tokens and are encoded apart, as the published code does, so that nothing a user
writes becomes a special token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from .tokenizer import SentencePieceTokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = -200
"""Stands in a prompt's ids where an image goes; no id of the tokenizer."""
IGNORE = -100
"""The label of a token that is not learnt."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: what the user says, without placeholders.
        answer: what the assistant says; None: that is to be found out, and nothing may follow.
        images: how many images the user shows, before the text.
    """

    question: str
    answer: str | None = None
    images: int = 0


class Encoded(NamedTuple):
    """Token ids, :data:`IMAGE_TOKEN` where images go, and their labels: answers and the eos behind each."""

    ids: list[int]
    labels: list[int]


def encode(turns: Sequence[Turn], tokenizer: SentencePieceTokenizer, system: str = SYSTEM) -> Encoded:
    """The ids of a conversation.

    Raises:
        InputError: no turn, an open turn before the last, or an answer that cannot be told from its prompt.
    """
    if not turns or any(turn.answer is None for turn in turns[:-1]):
        raise InputError(
            "This is no conversation.", "It needs a question, and an answer to each but the last."
        )
    ids, labels = [tokenizer.bos], [IGNORE]

    def say(tokens: Sequence[int], learnt: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learnt else [IGNORE] * len(tokens))

    for number, turn in enumerate(turns):
        text = f"{system} USER: " if number == 0 else "USER: "
        for _ in range(turn.images):
            say([*tokenizer.encode(text), IMAGE_TOKEN])
            text = "\n"
        prompt = f"{text}{turn.question} ASSISTANT:"
        asked = tokenizer.encode(prompt)
        say(asked)
        if turn.answer is None:
            continue
        whole = tokenizer.encode(f"{prompt} {turn.answer}")
        if whole[: len(asked)] != asked:
            raise InputError(
                f"The answer {turn.answer!r} cannot be told from its prompt.",
                "Its first letters merge with the prompt's last ones into one token.",
            )
        say([*whole[len(asked) :], tokenizer.eos], learnt=True)
    return Encoded(ids, labels)
