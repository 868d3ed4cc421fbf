"""Decoder weights stored joined or under other names: which rows each of our keys is."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from .decoder_config import DecoderConfig
from .layout import Shape

VISION, PROJECTOR, LANGUAGE = "vision_model.", "mlp1.", "language_model."
EMBEDDINGS, LM_HEAD = f"{LANGUAGE}model.embed_tokens.weight", f"{LANGUAGE}lm_head.weight"
BLOCKS = f"{LANGUAGE}model.layers."

STACKED = "mlp.experts.gate_up_proj"

Runs = tuple[tuple[int, int], ...]
"""Runs of rows: the first, and how many. A row is the last axis; all axes before it count as one."""


@dataclass(frozen=True)
class Part:
    """Rows of one stored tensor, whose shape must be ``shape``; without ``runs``, all of them."""

    name: str
    shape: Shape
    runs: Runs | None = None


@dataclass(frozen=True)
class Source:
    """Source of a tensor of ``shape``: parts concatenated, columns selected, transposed."""

    shape: Shape
    parts: tuple[Part, ...]
    columns: tuple[int, int] = (0, 1)
    transposed: bool = False


Split = Callable[[DecoderConfig, re.Match[str], Source], Source]


def split_decoder(c: DecoderConfig, sources: dict[str, Source], stored: Collection[str]) -> dict[str, Source]:
    """``sources``, with the decoder's tensors read from its kind's stored ones.

    Args:
        c: the decoder.
        sources: key to source, where all is stored as it is called here.
        stored: names of the stored tensors; they say whether Qwen3-MoE's experts are stacked.
    """
    rules = _SPLITS[c.kind]
    if c.kind == "qwen3_moe" and not any(name.endswith(STACKED) for name in stored):
        rules = ()
    out = dict(sources)
    for key, source in sources.items():
        matches = ((pattern.fullmatch(key), split) for pattern, split in rules)
        out[key] = next((split(c, match, source) for match, split in matches if match), source)
    return out


def _split_wqkv(c: DecoderConfig, match: re.Match[str], source: Source) -> Source:
    """InternLM2: of each key head its query heads, its key and its value, one head's rows after another."""
    d, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    first = {"q": 0, "k": group * d, "v": (group + 1) * d}[match[2]]
    count = group * d if match[2] == "q" else d
    size = (group + 2) * d
    runs = tuple((head * size + first, count) for head in range(c.num_key_value_heads))
    shape = (c.num_key_value_heads * size, *source.shape[1:])
    return replace(source, parts=(Part(f"{match[1]}attention.wqkv.{match[3]}", shape, runs),))


def _split_qkv(c: DecoderConfig, match: re.Match[str], source: Source) -> Source:
    """Phi-3: all queries, then all keys, then all values."""
    firsts = {"q": 0, "k": c.query_width, "v": c.query_width + c.key_width}
    shape = (c.query_width + 2 * c.key_width, *source.shape[1:])
    part = Part(f"{match[1]}self_attn.qkv_proj.{match[3]}", shape, ((firsts[match[2]], source.shape[0]),))
    return replace(source, parts=(part,))


def _split_gate_up(c: DecoderConfig, match: re.Match[str], source: Source) -> Source:
    """Phi-3: all gates, then all ups."""
    rows = source.shape[0]
    part = Part(
        f"{match[1]}mlp.gate_up_proj.weight",
        (2 * rows, source.shape[1]),
        ((0 if match[2] == "gate" else rows, rows),),
    )
    return replace(source, parts=(part,))


def _split_stacked(c: DecoderConfig, match: re.Match[str], source: Source) -> Source:
    """Qwen3-MoE as transformers 5 holds it: experts stacked, of each all gates and then all ups."""
    assert c.moe is not None
    number, rows = int(match[2]), source.shape[0]
    if match[3] == "down":
        part = Part(
            f"{match[1]}mlp.experts.down_proj", (c.moe.experts, *source.shape), ((number * rows, rows),)
        )
    else:
        run = (number * 2 * rows + (rows if match[3] == "up" else 0), rows)
        part = Part(f"{match[1]}{STACKED}", (c.moe.experts, 2 * rows, source.shape[1]), (run,))
    return replace(source, parts=(part,))


def _split_gpt_oss(c: DecoderConfig, match: re.Match[str], source: Source) -> Source:
    """GPT-OSS: experts stacked, [in, out], gates and ups alternating; biases likewise."""
    assert c.moe is not None
    number, experts, down = int(match[2]), c.moe.experts, match[3] == "down"
    columns = (0, 1) if down else (0 if match[3] == "gate" else 1, 2)
    name = f"{match[1]}mlp.experts.{'down' if down else 'gate_up'}_proj"
    out = source.shape[0] * columns[1]
    if match[4] == "bias":
        part = Part(f"{name}_bias", (experts, out), ((number, 1),))
        return replace(source, parts=(part,), columns=columns)
    rows = source.shape[1]
    part = Part(name, (experts, rows, out), ((number * rows, rows),))
    return replace(source, parts=(part,), columns=columns, transposed=True)


def _rename(name: str) -> Split:
    def split(c: DecoderConfig, match: re.Match[str], source: Source) -> Source:
        return replace(source, parts=(Part(match.expand(name), source.shape),))

    return split


def _rules(*rules: tuple[str, Split]) -> tuple[tuple[re.Pattern[str], Split], ...]:
    return tuple((re.compile(pattern), split) for pattern, split in rules)


_B = rf"({re.escape(BLOCKS)}\d+\.)"
_EXPERT = _B + r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.(weight|bias)"
_SPLITS: dict[str, tuple[tuple[re.Pattern[str], Split], ...]] = {
    "llama": (),
    "internlm3": (),
    "qwen2": (),
    "qwen3": (),
    "qwen3_moe": _rules((_EXPERT, _split_stacked)),
    "phi3": _rules(
        (_B + r"self_attn\.([qkv])_proj\.(weight|bias)", _split_qkv),
        (_B + r"mlp\.(gate|up)_proj\.weight", _split_gate_up),
    ),
    "gpt_oss": _rules(
        (_EXPERT, _split_gpt_oss), (_B + r"mlp\.gate\.(weight|bias)", _rename(r"\1mlp.router.\2"))
    ),
    "internlm2": _rules(
        (_B + r"self_attn\.([qkv])_proj\.(weight|bias)", _split_wqkv),
        (_B + r"self_attn\.o_proj\.(weight|bias)", _rename(r"\1attention.wo.\2")),
        (_B + r"mlp\.gate_proj\.weight", _rename(r"\1feed_forward.w1.weight")),
        (_B + r"mlp\.up_proj\.weight", _rename(r"\1feed_forward.w3.weight")),
        (_B + r"mlp\.down_proj\.weight", _rename(r"\1feed_forward.w2.weight")),
        (_B + r"input_layernorm\.weight", _rename(r"\1attention_norm.weight")),
        (_B + r"post_attention_layernorm\.weight", _rename(r"\1ffn_norm.weight")),
        (re.escape(EMBEDDINGS), _rename(f"{LANGUAGE}model.tok_embeddings.weight")),
        (re.escape(LM_HEAD), _rename(f"{LANGUAGE}output.weight")),
    ),
}
