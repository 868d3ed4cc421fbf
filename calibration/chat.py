"""Conversations about the images of a calibration set.

A conversation runs as a service runs it: the prompt with its image at once, then after its cache the tokens
of the last answer. Those go in together (teacher forcing): the activations are those of one token a step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..inputs.chat_template import IGNORE, IMAGE_TOKEN, Turn, encode
from ..inputs.tokenizer import SentencePieceTokenizer
from ..models.calls import LONGEST_PROMPT, LONGEST_STEP, Dialogue
from .dataset import Sample

QUESTION = "Describe this image."
"""The question about images that come with a caption, which is the answer."""
SCENE_TURNS = 3


def dialogue_of(sample: Sample, tokenizer: SentencePieceTokenizer) -> Dialogue:
    """A conversation about ``sample``, always the same: of its scene, or its caption as an answer."""
    turns = [Turn(QUESTION, sample.text, 1)]
    if not isinstance(sample.image, Path):
        from ..synthetic import dialogues

        rng = np.random.default_rng(int(sample.digest[:16], 16))
        turns = dialogues.conversation(dialogues.dialogue(rng, sample.image, SCENE_TURNS))  # type: ignore[arg-type]
    ids, labels = encode(turns, tokenizer)
    last = len(ids) - next(i for i, label in enumerate([*reversed(labels), IGNORE]) if label == IGNORE)
    cut = ids.index(IMAGE_TOKEN)
    answer = ids[last:-1][:LONGEST_STEP] or ids[last:]
    return Dialogue(tuple(ids[:cut]), tuple(ids[cut + 1 : last][-LONGEST_PROMPT:]), tuple(answer))
