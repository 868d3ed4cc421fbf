"""Prefix reuse: the first token about a known image, and about a new one.

The calls are those of :mod:`ivl_export.profiles.measure.chat_latency`: pixels and a new
question in, one token's text out. ``equal``: a whole answer is the same with and without reuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.bundle import Bundle
from ivl_export.profiles.measure.chat_latency import question
from ivl_export.profiles.measure.inputs import random_pixels
from ivl_export.runtime import InternVLChat
from ivl_export.runtime.components import Components

FASTER = 3.0
"""How many times as fast the first token shall be where the image is known."""
FIRST, NEXT, OTHER = "first question about an image", "next question", "another conversation, same image"
PRECISIONS = ("fp32", "int8")


def measure(setting: Setting) -> Sequence[Comparison]:
    """Each chat model in each precision."""
    return [
        compared(setting, f"{model}-chat", precision) for model in setting.models for precision in PRECISIONS
    ]


def compared(setting: Setting, name: str, precision: str) -> Comparison:
    """The first token of a question in three conversations, which share their engines."""
    bundle = Bundle.open(setting.bundle(name, precision))
    components = Components(bundle, "onnxruntime", threads=setting.threads)
    with InternVLChat(bundle, components, kept_bytes=0) as alone:
        sharing = InternVLChat(bundle, components)
        size = alone.image_settings.size
        pixels = random_pixels((1, 3, size, size))
        chat = sharing.chat(pixels)

        def ask_again() -> str:
            chat.restart()
            return chat.ask(question(), 1, min_new_tokens=1)

        def ask_anew(model: InternVLChat) -> str:
            return model.chat(pixels).ask(question(), 1, min_new_tokens=1)

        ask_again()
        timed = side_by_side(
            [
                Candidate(FIRST, partial(ask_anew, alone), precision),
                Candidate(NEXT, ask_again, precision),
                Candidate(OTHER, partial(ask_anew, sharing), precision),
            ],
            setting.rounds,
        )
        prompt, tokens = question(), setting.new_tokens
        answers = {model.chat(pixels).ask(prompt, tokens) for model in (alone, sharing)}
        facts = {
            "equal": len(answers) == 1,
            "image_positions": len(chat.cache.visual[0]),
            "prompt_positions": chat.cache.length,
        }
    goals = tuple(Goal(of, FIRST, "speed", FASTER) for of in (NEXT, OTHER))
    return Comparison(f"{name}: one token of an answer", timed, goals, facts)
