"""The components: what each takes and gives (its spec), and the module that computes it.

A module's ``state_dict`` names are the published keys, so that one checkpoint fills any of them and the
traced graph's initializers keep their names. Sizes come from the config, ranges from :class:`Ranges`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CapabilityError, UsageError
from ..models.config import InternVLConfig
from ..models.layout import COMPONENTS
from ..specs import Axis, ComponentSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

Range = tuple[int, int, int]


@dataclass(frozen=True)
class Ranges:
    """Smallest, tuned-for and largest size of the dynamic axes.

    Args:
        batch: rows of every component.
        text: tokens of a ``qllama_text`` row; 80 is the longest the model was trained on.
        prompt: new tokens of one ``qllama_step``: 1 while decoding, the prompt's length at first.
        caption: text positions that a ``qllama_step`` may find in its past, behind the queries.
    """

    batch: Range = (1, 8, 128)
    text: Range = (1, 16, 80)
    prompt: Range = (1, 1, 32)
    caption: Range = (0, 36, 128)


def component_names(contrastive_only: bool = False) -> tuple[str, ...]:
    """The components of a model; InternVL-C alone (the older files) has no query and no caption pass."""
    return ("vision", "qllama_text") if contrastive_only else COMPONENTS


def component_spec(name: str, config: InternVLConfig, ranges: Ranges | None = None) -> ComponentSpec:
    """Inputs, outputs and axes of component ``name`` (see docs/architecture.md, "Components").

    ``total`` is the second axis of ``attention_mask``: past plus text.

    Raises:
        UsageError: no such component.
    """
    ranges = ranges or Ranges()
    v, q = config.vision, config.qllama
    queries, embed = config.num_query_token, config.clip_embed_dim
    batch = Axis("batch", *ranges.batch)
    tokens = TensorSpec("tokens", "float", ("batch", v.num_tokens, v.hidden_size))
    if name == "vision":
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, v.image_size, v.image_size))
        out = (tokens, TensorSpec("image_embed", "float", ("batch", embed)))
        return ComponentSpec(name, (pixels,), out, (batch,))
    if name == "qllama_query":
        hidden = TensorSpec("query_hidden", "float", ("batch", queries, q.hidden_size))
        pooled = TensorSpec("query_embed", "float", ("batch", embed))
        return ComponentSpec(name, (tokens,), (hidden, pooled, *_key_values(config, "", queries)), (batch,))
    ids = TensorSpec("input_ids", "int64", ("batch", "text"))
    if name == "qllama_text":
        lengths = TensorSpec("lengths", "int64", ("batch",))
        pooled = TensorSpec("text_embed", "float", ("batch", embed))
        return ComponentSpec(name, (ids, lengths), (pooled,), (batch, Axis("text", *ranges.text)))
    if name == "qllama_step":
        text = Axis("text", *ranges.prompt)
        past = Axis("past", *(queries + n for n in ranges.caption))
        total = Axis("total", past.min + text.min, past.opt + text.opt, past.max + text.max)
        positions = TensorSpec("positions", "int64", ("batch", "text"))
        mask = TensorSpec("attention_mask", "int64", ("batch", "total"))
        logits = TensorSpec("logits", "float", ("batch", q.vocab_size))
        return ComponentSpec(
            name,
            (ids, positions, mask, *_key_values(config, "past_", "past")),
            (logits, *_key_values(config, "", "text")),
            (batch, text, past, total),
        )
    raise UsageError(f"Unknown component {name!r}.", fix=f"Choose from {', '.join(COMPONENTS)}.")


def _key_values(config: InternVLConfig, prefix: str, length: int | str) -> list[TensorSpec]:
    q = config.qllama
    shape = ("batch", q.num_attention_heads, length, q.head_dim)
    return [
        TensorSpec(f"{prefix}{kind}.{i}", "float", shape)
        for i in range(q.num_hidden_layers)
        for kind in ("key", "value")
    ]


def component_module(name: str, config: InternVLConfig, contrastive_only: bool = False) -> nn.Module:
    """The module of component ``name``; build it on the meta device and fill it with ``load_state``.

    ``forward`` takes the spec's inputs and returns the spec's outputs, both in the spec's order.

    Raises:
        UsageError: no such component.
        CapabilityError: the component needs weights that an InternVL-C file lacks.
    """
    from . import modules

    classes: dict[str, type[nn.Module]] = {
        "vision": modules.Vision,
        "qllama_query": modules.Query,
        "qllama_text": modules.Text,
        "qllama_step": modules.Step,
    }
    if name not in classes:
        raise UsageError(f"Unknown component {name!r}.", fix=f"Choose from {', '.join(COMPONENTS)}.")
    if name not in component_names(contrastive_only):
        raise CapabilityError(
            f"Component {name} cannot be made from this checkpoint.",
            "It is an InternVL-C file, without queries, cross-attention and lm_head.",
            "Use an InternVL-14B-224px checkpoint, or leave the component out.",
        )
    return classes[name](config).eval()
