"""Times a chat bundle: its components, the first token, and an answer.

Every question is new, so that no cache has it; a case's statement about its image holds in
every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count

from ...arrays import Floats
from ...bundle.spec import ComponentSpec
from ...inputs.chat_template import Turn
from ...models.config import ChatConfig
from ...models.families.chat import TEXT_TOKENS
from ...runtime import InternVLChat
from ...runtime.kv_cache import PrefixCache
from .cases import Case, Task
from .inputs import JPEG_SIZE, TEXT, random_pixels
from .latency import (
    CAPTION_TOKENS,
    batches_of,
    component,
    detokenizing,
    named,
    preprocessing,
    sizes_of,
    specs_of,
)

FIRST = "first token"
NEXT = "next question"
OTHER = "other chat"
ANSWER = "answer"
_NUMBERS = count()


def question() -> str:
    """A new question, of as many tokens as the others; they differ from the first word on."""
    return f"{next(_NUMBERS):06d}"[::-1] + f" {TEXT}?"


def plan(
    model: InternVLChat, config: ChatConfig, batches: Sequence[int] | None = None, lengths: Sequence[int] = ()
) -> list[Task]:
    """All cases of a loaded chat bundle, components first; conversations are timed one at a time.

    Args:
        model: the bundle.
        config: its model's sizes.
        batches, lengths: as :func:`.latency.plan`; of the decoder a prefill of one image and a question is
            timed too.
    """
    specs = specs_of(model, config)
    chosen = batches_of(specs.values(), batches)
    texts, words = model.tokenizer.reads_texts, TEXT_TOKENS
    if texts:
        words = len(model.chat_format.encode([Turn(question(), None, 1)], model.tokenizer).ids) - 1
    prompt = config.num_visual + words
    tasks = [
        task
        for spec in specs.values()
        for batch in chosen
        for sizes in (*sizes_of(spec, batch, lengths, config), *_prefill(spec, batch, prompt))
        for task in component(model, spec, config, sizes)
    ]
    tasks += _chained(model, specs["vision_chat"], specs["decoder"], prompt) if texts else []
    width, height = JPEG_SIZE
    for batch in chosen:
        boundary = f"JPEG files of {width} x {height} in memory in, pixels out: decode, resize, normalise"
        prepare = partial(preprocessing, model, batch)
        tasks.append(Task("preprocess", "host", batch, {}, batch, "images", boundary, prepare))
        if not texts:
            continue
        boundary = f"{CAPTION_TOKENS} token ids an answer in, strings out"
        prepare = partial(detokenizing, model, batch)
        tasks.append(Task("postprocess answer", "host", batch, {}, batch, "texts", boundary, prepare))
    return named(model, tasks)


def token_ms(cases: Iterable[Case]) -> float | None:
    """Milliseconds of each further token: an answer less its first one; None where they were not timed."""
    chained = {case.name: case for case in cases if case.kind == "chained"}
    if not chained.keys() >= {NEXT, ANSWER} or chained[ANSWER].items < 2:
        return None
    answer, first = (chained[name].measurement.summary.p50_ms for name in (ANSWER, NEXT))
    return (answer - first) / (chained[ANSWER].items - 1)


def _prefill(spec: ComponentSpec, batch: int, prompt: int) -> list[dict[str, int]]:
    if not any(axis.name == "past" for axis in spec.axes):
        return []
    text, past = min(prompt, spec.axis("text").max), spec.axis("past").min
    return [{"batch": batch, "text": text, "past": past, "total": text + past}]


def _chained(model: InternVLChat, vision: ComponentSpec, decoder: ComponentSpec, prompt: int) -> list[Task]:
    pixels = random_pixels((1, *vision.shape(vision.inputs[0], "opt")[1:]))
    tasks = []
    known = {
        FIRST: "a new image",
        NEXT: "an image known to this conversation",
        OTHER: "an image known to another conversation",
    }
    for name, state in known.items():
        boundary = f"pixel_values and a question in, one token's text out: {state}"
        prepare = partial(_first_token, model, pixels, name)
        tasks.append(Task(name, "chained", 1, {"tokens": prompt}, 1, "questions", boundary, prepare))
    tokens = min(CAPTION_TOKENS, decoder.axis("past").max - prompt + 1)
    if tokens > 0:
        boundary = f"a question in, text out: greedy, exactly {tokens} tokens, {known[NEXT]}"
        sizes = {"prompt": prompt, "new_tokens": tokens}
        prepare = partial(_answer, model, pixels, tokens)
        tasks.append(Task(ANSWER, "chained", 1, sizes, tokens, "tokens", boundary, prepare))
    return tasks


def _first_token(model: InternVLChat, pixels: Floats, name: str) -> Callable[[], object]:
    if name == NEXT:
        return _answer(model, pixels, 1)
    # Of no bytes: each question is the first about its image.
    model.prefixes = PrefixCache(0) if name == FIRST else PrefixCache()

    def ask() -> str:
        return model.chat(pixels).ask(question(), 1, min_new_tokens=1)

    ask()
    return ask


def _answer(model: InternVLChat, pixels: Floats, tokens: int) -> Callable[[], object]:
    model.prefixes = PrefixCache()
    chat = model.chat(pixels)

    def ask() -> str:
        chat.restart()
        return chat.ask(question(), tokens, min_new_tokens=tokens)

    ask()
    return ask
