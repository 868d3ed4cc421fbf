"""A chat model on a GPU that is not here: time to the first token, tokens per second, memory with the cache.

As :mod:`.estimate`, from the same roofline and shares. A conversation shows one image with its question. Its
prompt is read alone, as the runtime does it; answers are decoded together, a token of each in one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...dtypes import dtype_of
from ...models.config import VICUNA_13B, ChatConfig, InternVLConfig, QLlamaConfig
from ...models.decoder_config import DecoderConfig
from ...models.families.chat import NEW_TOKENS, TEXT_TOKENS
from ...models.registry import component_names, component_spec, components_of, family_of
from ...quantization.recipe import LayerPlan, Recipe
from .estimate import RECEIPTS, Efficiencies, call_times, known, per_million, working_bytes
from .evidence import Check
from .gpus import GpuPeaks
from .roofline import Arithmetic, ComponentTime
from .sizes import weights

SCHEMA = "ivl-export.chat-estimate/1"
FULL_SIZE = {
    "InternVL-Chat-ViT-6B-Vicuna-7B": ChatConfig(),
    "InternVL-Chat-ViT-6B-Vicuna-13B": ChatConfig(decoder=VICUNA_13B),
    "InternVL-Chat-QLLaMA-Vicuna-7B": ChatConfig(InternVLConfig()),
    "InternVL-Chat-QLLaMA-Vicuna-13B": ChatConfig(InternVLConfig(), VICUNA_13B),
}
"""The paper's chat models (section 3.3); of those with QLLaMA no weights were published, nor names."""


@dataclass(frozen=True)
class ChatPoint:
    """``batch`` conversations that begin at once.

    Args:
        batch: how many.
        image_ms: encoding their images together: ``vision_chat``, and ``query_chat`` where there is one.
        prompt_ms: reading one prompt.
        first_token_ms: until the last of them has its first token: all images, then prompt after prompt.
        token_ms: a step: one more token for each.
        tokens_per_s: of such steps, all conversations together.
        questions_per_s: whole answers, images and prompts included.
        cost: of a million questions, in the currency of the price; None without one.
        cache_bytes: keys and values of each conversation at its end, twice: where it is decoded, and where it
            is kept for the next question.
        memory_bytes: weights, these, and activations.
        fits: into the GPU's memory.
        components: the calls: images, one prompt, one step.
    """

    batch: int
    image_ms: float
    prompt_ms: float
    first_token_ms: float
    token_ms: float
    tokens_per_s: float
    questions_per_s: float
    cost: float | None
    cache_bytes: int
    memory_bytes: int
    fits: bool
    components: tuple[ComponentTime, ...]


@dataclass(frozen=True)
class ChatEstimate:
    """Prediction of :func:`estimate`, and its assumptions; ``prompt_tokens`` are image and text together."""

    gpu: GpuPeaks
    precision: str
    image_size: int
    prompt_tokens: int
    new_tokens: int
    weight_bytes: int
    points: tuple[ChatPoint, ...]
    efficiencies: Efficiencies
    assumptions: tuple[str, ...]
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the schema's name."""
        return {"schema": SCHEMA, **asdict(self)}


def cache_bytes(decoder: QLlamaConfig | DecoderConfig, base: str, positions: int) -> int:
    """Keys and values of ``positions`` in all layers of a decoder, in the type ``base``."""
    return 2 * decoder.num_hidden_layers * decoder.key_width * positions * dtype_of(base).bits // 8


def estimate(
    config: ChatConfig,
    recipe: Recipe,
    layers: LayerPlan,
    gpu: GpuPeaks,
    batches: Sequence[int],
    cost_per_hour: float | None = None,
    text_tokens: int = TEXT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    receipts: Path = RECEIPTS,
) -> ChatEstimate:
    """Predict a chat model of ``config`` in a precision on ``gpu``.

    Args:
        config: the model's sizes.
        recipe, layers, gpu, cost_per_hour, receipts: as :func:`.estimate.estimate`.
        batches: conversations at a time.
        text_tokens: of a prompt, besides its image.
        new_tokens: of an answer.

    Raises:
        CapabilityError: the GPU has no peak for a type of this precision.
    """
    arithmetic = Arithmetic.of(recipe, layers)
    shares, assumptions, checks = known(gpu, arithmetic, receipts)
    names = component_names(config)
    needed = sum(weights(config, recipe, layers, [name]).nbytes for name in names)
    tiles = family_of(config).photograph_tiles(config)
    visual = tiles * config.num_visual
    prompt = visual + text_tokens
    shown = f"{visual} positions of one image"
    shown += f" (a photograph of 4:3 in {tiles} tiles)" if tiles > 1 else ""
    decoder = next(c for c in components_of(config) if c.cached)

    def point(batch: int) -> ChatPoint:
        images_once = [c.name for c in components_of(config) if c.tower != decoder.tower]
        calls = [(name, {"batch": batch * tiles}) for name in images_once]
        calls.append((decoder.name, {"text": prompt, "past": 1}))
        calls.append((decoder.name, {"batch": batch, "text": 1, "past": prompt + new_tokens // 2}))
        costs, times = call_times(config, calls, arithmetic, gpu, shares.values)
        *images, prefill, step = (time.expected_ms for time in times)
        first = sum(images) + batch * prefill
        whole = first + (new_tokens - 1) * step
        cache = batch * cache_bytes(config.decoder, arithmetic.base, 2 * (prompt + new_tokens))
        memory = needed + cache + working_bytes(costs[:-1])
        return ChatPoint(
            batch,
            sum(images),
            prefill,
            first,
            step,
            1e3 * batch / step,
            1e3 * batch / whole,
            per_million(whole, batch, cost_per_hour),
            cache,
            memory,
            gpu.fits(memory),
            times,
        )

    most = component_spec(decoder.name, config).axis("batch").max
    limit = f"The decoder of a bundle takes at most {most} conversations at a time."
    return ChatEstimate(
        gpu,
        recipe.name,
        config.image_size,
        prompt,
        new_tokens,
        needed,
        tuple(map(point, batches)),
        shares,
        (
            f"A conversation: {shown}, {text_tokens} text tokens, an answer of {new_tokens}. Images are "
            "encoded together, prompts read one after another, answers decoded together.",
            "Nothing is known of an image; another question about it would find image and prompt encoded.",
            "A step is one in the middle of an answer, and computes over the positions in the cache.",
            "Engines of all components are loaded together, each with its own weights.",
            "Memory: these weights, keys and values in the base type (of each conversation at its end, once "
            "where it is decoded and once where it is kept for the next question), and four times the "
            "widest layer's activations; no CUDA context, nor room that a cache keeps free.",
            *([limit] if max(batches) > most else []),
            *assumptions,
        ),
        checks,
    )
