"""The components: what each takes and gives (its spec), and the module that computes it.

A module's ``state_dict`` names are the published keys, so that one checkpoint fills any of them and the
traced graph's initializers keep their names. Sizes come from the config, ranges from :class:`Ranges`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..bundle.spec import Axis, ComponentSpec, TensorSpec, feature_name
from ..errors import CapabilityError, UsageError
from ..models.config import ChatConfig, InternViTConfig, ModelConfig, QLlamaConfig
from ..models.layout import COMPONENTS, OPTIONAL, components_of

if TYPE_CHECKING:
    from torch import nn

Range = tuple[int, int, int]
C = TypeVar("C")


@dataclass(frozen=True)
class Ranges:
    """Smallest, tuned-for and largest size of the dynamic axes.

    Args:
        batch: rows of every component.
        text: tokens of a ``qllama_text`` or ``qllama_itm`` row; 80 is the longest the model was trained on.
        prompt: new tokens of one ``qllama_step``: 1 while decoding, the prompt's length at first.
        caption: text positions that a ``qllama_step`` may find in its past, behind the queries.
        chats: rows of a chat model's decoder, whose cache is half a megabyte a token and more.
        turn: new positions of one ``decoder`` step: 1 while decoding; an image is 576 at first.
        history: positions of the cache that a ``decoder`` step is given; the mask hides the empty ones.
    """

    batch: Range = (1, 8, 128)
    text: Range = (1, 16, 80)
    prompt: Range = (1, 1, 32)
    caption: Range = (0, 36, 128)
    chats: Range = (1, 1, 8)
    turn: Range = (1, 1, 1024)
    history: Range = (1, 1024, 2048)


def component_spec(name: str, config: ModelConfig, ranges: Ranges | None = None) -> ComponentSpec:
    """Inputs, outputs and axes of component ``name`` (see docs/architecture.md, "Components").

    ``total`` is the second axis of ``attention_mask``: past plus text. An InternViT alone has no
    ``image_embed``.

    Raises:
        UsageError: the model has no such component.
    """
    ranges = ranges or Ranges()
    if isinstance(config, ChatConfig):
        return _chat_spec(name, config, ranges)
    v = config.vision
    batch = Axis("batch", *ranges.batch)
    tokens = TensorSpec("tokens", "float", ("batch", v.num_tokens, v.hidden_size))
    if name == "vision":
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, v.image_size, v.image_size))
        kept = [TensorSpec(feature_name(k), "float", tokens.shape) for k in v.feature_blocks]
        if isinstance(config, InternViTConfig):
            return ComponentSpec(name, (pixels,), (tokens, *kept), (batch,))
        image_embed = TensorSpec("image_embed", "float", ("batch", config.clip_embed_dim))
        return ComponentSpec(name, (pixels,), (tokens, image_embed, *kept), (batch,))
    if isinstance(config, InternViTConfig):
        raise _unknown(name, components_of(config))
    q, queries, embed = config.qllama, config.num_query_token, config.clip_embed_dim
    if name == "qllama_query":
        hidden = TensorSpec("query_hidden", "float", ("batch", queries, q.hidden_size))
        pooled = TensorSpec("query_embed", "float", ("batch", embed))
        return ComponentSpec(name, (tokens,), (hidden, pooled, *_key_values(q, "", queries)), (batch,))
    ids = TensorSpec("input_ids", "int64", ("batch", "text"))
    if name == "qllama_text":
        lengths = TensorSpec("lengths", "int64", ("batch",))
        pooled = TensorSpec("text_embed", "float", ("batch", embed))
        return ComponentSpec(name, (ids, lengths), (pooled,), (batch, Axis("text", *ranges.text)))
    if name == "qllama_itm":
        lengths = TensorSpec("lengths", "int64", ("batch",))
        logits = TensorSpec("itm_logits", "float", ("batch", 2))
        return ComponentSpec(name, (tokens, ids, lengths), (logits,), (batch, Axis("text", *ranges.text)))
    if name == "qllama_step":
        past = tuple(queries + n for n in ranges.caption)
        return _step_spec(name, ids, q, (batch, *_lengths(ranges.prompt, past)))
    raise _unknown(name, (*COMPONENTS, *OPTIONAL))


def _chat_spec(name: str, config: ChatConfig, ranges: Ranges) -> ComponentSpec:
    width, side = config.decoder.hidden_size, config.image_size
    rows, (text, past, total) = Axis("batch", *ranges.chats), _lengths(ranges.turn, ranges.history)
    embeds = TensorSpec("input_embeds", "float", ("batch", "text", width))
    batch = Axis("batch", *ranges.batch)
    states = TensorSpec("tokens", "float", ("batch", config.num_tokens, config.vision.hidden_size))
    tokens = (states,) if config.queries else ()
    if name == "vision_chat":
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, side, side))
        visual = TensorSpec("visual_embeds", "float", ("batch", config.num_features, width))
        return ComponentSpec(name, (pixels,), (visual, *tokens), (batch,))
    if name == "query_chat" and config.queries:
        queries = TensorSpec("query_embeds", "float", ("batch", config.num_queries, width))
        return ComponentSpec(name, tokens, (queries,), (batch,))
    if name == "decoder_embed":
        ids = TensorSpec("input_ids", "int64", ("batch", "text"))
        return ComponentSpec(name, (ids,), (embeds,), (rows, text))
    if name == "decoder":
        return _step_spec(name, embeds, config.decoder, (rows, text, past, total))
    raise _unknown(name, components_of(config))


def _step_spec(name: str, first: TensorSpec, llama: QLlamaConfig, axes: tuple[Axis, ...]) -> ComponentSpec:
    """A LLaMA over a cache: ``first`` holds the new positions, [batch, text] or [batch, text, H]."""
    positions = TensorSpec("positions", "int64", ("batch", "text"))
    mask = TensorSpec("attention_mask", "int64", ("batch", "total"))
    logits = TensorSpec("logits", "float", ("batch", llama.vocab_size))
    return ComponentSpec(
        name,
        (first, positions, mask, *_key_values(llama, "past_", "past")),
        (logits, *_key_values(llama, "", "text")),
        axes,
    )


def _lengths(text: Range, past: tuple[int, ...]) -> tuple[Axis, Axis, Axis]:
    """The axes ``text``, ``past`` and their sum."""
    return (
        Axis("text", *text),
        Axis("past", *past),
        Axis("total", *(a + b for a, b in zip(text, past, strict=True))),
    )


def _key_values(q: QLlamaConfig, prefix: str, length: int | str) -> list[TensorSpec]:
    shape = ("batch", q.num_attention_heads, length, q.head_dim)
    return [
        TensorSpec(f"{prefix}{kind}.{i}", "float", shape)
        for i in range(q.num_hidden_layers)
        for kind in ("key", "value")
    ]


def _unknown(name: str, known: tuple[str, ...]) -> UsageError:
    return UsageError(f"Unknown component {name!r}.", fix=f"Choose from {', '.join(known)}.")


def component_module(name: str, config: ModelConfig, contrastive_only: bool = False) -> nn.Module:
    """The module of component ``name``; build it on the meta device and fill it with ``load_state``.

    ``forward`` takes the spec's inputs and returns the spec's outputs, both in the spec's order.

    Raises:
        UsageError: no such component.
        CapabilityError: the component needs weights that an InternVL-C file lacks.
    """
    from . import modules

    if isinstance(config, ChatConfig):
        return _made(name, config, modules.QUERY_CHAT if config.queries else modules.CHAT)
    if isinstance(config, InternViTConfig):
        return _made(name, config, modules.INTERNVIT)
    if contrastive_only and name in modules.INTERNVL and name not in components_of(config, True):
        raise CapabilityError(
            f"Component {name} cannot be made from this checkpoint.",
            "It is an InternVL-C file, without queries, cross-attention and lm_head.",
            "Use an InternVL-14B-224px checkpoint, or leave the component out.",
        )
    return _made(name, config, modules.INTERNVL)


def _made(name: str, config: C, makers: Mapping[str, Callable[[C], nn.Module]]) -> nn.Module:
    if name not in makers:
        raise _unknown(name, tuple(makers))
    return makers[name](config).eval()
