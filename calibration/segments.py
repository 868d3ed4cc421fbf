"""Component modules a part at a time: what stands before their blocks, each block, what stands behind.

InternVL's components are two towers: InternViT, and the QLLaMA layers that query, text, step and matching
passes share. A chat model's towers are InternViT with a projector, QLLaMA with one of its own (where there
are queries), and the decoder.
Modules stay on the meta device; a part's weights are there while the part runs, and no longer, so memory
follows one block and not the model. A part computes just what the component's ``forward`` computes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..export.blocks import block_pattern
from ..export.components import component_module
from ..models.chat_vision import QueryTower
from ..models.config import ChatConfig, Whole
from ..models.generate import step_mask
from ..models.layout import CHAT_TOWER, components_of
from ..models.qllama import KeyValue, Visible, rotary_tables

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

TOWERS = {
    "vision": ("vision",),
    "qllama": ("qllama_query", "qllama_text", "qllama_step", "qllama_itm"),
    "vision_chat": ("vision_chat",),
    "query_chat": ("query_chat",),
    "decoder": ("decoder_embed", "decoder"),
}
"""Components that run through the same blocks."""

ORDER = tuple(component for tower in TOWERS.values() for component in tower)
TOKENS_OF = {"qllama_query": "vision", "qllama_itm": "vision", "query_chat": "vision_chat"}
"""Components that take vision tokens, and whose."""

_NEEDS = {
    **{component: (tower,) for component, tower in TOKENS_OF.items()},
    "qllama_step": ("vision", "qllama_query"),
    "decoder": ("vision_chat", "query_chat", "decoder_embed"),
}

WITHOUT_BLOCKS = ("decoder_embed",)
"""Components that end where their tower's blocks begin."""

ENTRY = (
    "vision_model.embeddings.",
    "query_tokens",
    "qllama.model.embed_tokens.",
    "model.embed_tokens.",
    f"{CHAT_TOWER}embeddings.",
    f"{CHAT_TOWER}vision_model.embeddings.",
    f"{CHAT_TOWER}query_tokens",
)
"""Weights that stand before the blocks."""

FEATURES = "model.mm_projector.mlp1."
"""Weights that stand beside them: the projector of features that leave the tower in the midst of it."""

Load = Callable[[str], Tensor]
"""An fp32 weight by its published key."""


def needs(component: str, config: Whole) -> set[str]:
    """The components of a model of ``config`` whose outputs ``component`` takes."""
    return set(_NEEDS.get(component, ())) & set(components_of(config))


def needed(components: Iterable[str], config: Whole) -> list[str]:
    """``components`` and those they take inputs from, in the order they run."""
    wanted = set(components)
    for component in list(wanted):
        wanted.update(needs(component, config))
    return [c for c in ORDER if c in wanted] + sorted(wanted - set(ORDER))


class Part(NamedTuple):
    """One part of a tower: its ``block``, or the entry (-1) or the exit (its depth).

    ``features``: whether what it makes also leaves the tower, through a projector of its own.
    """

    tower: str
    block: int
    depth: int
    features: bool = False

    @property
    def entry(self) -> bool:
        """Whether it stands before the blocks."""
        return self.block < 0

    @property
    def exit(self) -> bool:
        """Whether it stands behind the blocks."""
        return self.block == self.depth

    def holds(self, component: str, key: str) -> bool:
        """Whether weight ``key`` of ``component`` belongs to it."""
        if found := block_pattern(component).match(key):
            return int(found[1]) == self.block
        if key.startswith(FEATURES):
            return self.features
        return self.entry if key.startswith(ENTRY) else self.exit


def depths(config: Whole) -> dict[str, int]:
    """Blocks of each tower."""
    if isinstance(config, ChatConfig):
        queries = {"query_chat": config.queries.qllama.num_hidden_layers} if config.queries else {}
        return {
            "vision_chat": config.vision_blocks,
            **queries,
            "decoder": config.decoder.num_hidden_layers,
        }
    return {"vision": config.vision.num_hidden_layers, "qllama": config.qllama.num_hidden_layers}


def parts(config: Whole, components: Iterable[str]) -> list[Part]:
    """All parts of the towers of ``components``, in the order they run."""
    names = set(components)
    apart = config.read_blocks - 1 if isinstance(config, ChatConfig) and config.queries else None
    return [
        Part(tower, block, depth, tower == "vision_chat" and block == apart)
        for tower, depth in depths(config).items()
        if names & set(TOWERS[tower])
        for block in range(-1, depth + 1)
    ]


class Modules:
    """The modules of ``components`` without weights; :meth:`filled` gives one part its own.

    Raises (on construction):
        CapabilityError: a component that the checkpoint has no weights for.
        UsageError: no such component.
    """

    def __init__(
        self, checkpoint: Checkpoint, components: Iterable[str], load: Load | None = None, device: str = "cpu"
    ) -> None:
        self.config, self.device = checkpoint.whole, device
        self.load: Load = load or (lambda key: checkpoint.load(key, torch.float32, device))
        self.by_name: dict[str, nn.Module] = {}
        for component in components:
            with torch.device("meta"):
                module = component_module(component, checkpoint.whole, checkpoint.contrastive_only)
            self.by_name[component] = module.requires_grad_(False)
        self.keys = {component: list(module.state_dict()) for component, module in self.by_name.items()}

    @contextmanager
    def filled(self, part: Part) -> Iterator[None]:
        """The weights of ``part`` are there inside the ``with`` block; components share them."""
        keys = {
            component: [key for key in self.keys[component] if part.holds(component, key)]
            for component in TOWERS[part.tower]
            if component in self.by_name
        }
        loaded: dict[str, Tensor] = {}
        try:
            for component, names in keys.items():
                for key in names:
                    if key not in loaded:
                        loaded[key] = self.load(key).to(self.device)
                    _put(self.by_name[component], key, loaded[key])
            yield
        finally:
            for component, names in keys.items():
                for key in names:
                    module = self.by_name[component]
                    _put(module, key, torch.empty_like(module.get_parameter(key), device="meta"))


@dataclass(frozen=True)
class Context:
    """What a component takes besides its hidden states.

    Args:
        inputs: its inputs as arrays turned into tensors: ids, lengths, positions, mask, pixels.
        rows: samples in the batch.
        tokens: vision tokens [B, N, D], for the query pass and for matching.
        past: keys and values of this layer in the query pass, for the step; of the prompt, for the answer.
    """

    inputs: Mapping[str, Tensor]
    rows: int
    tokens: Tensor | None = None
    past: KeyValue | None = None


def enter(component: str, module: Any, given: Context) -> Tensor:
    """The first hidden states [B, T, H]."""
    if component == "vision":
        out: Tensor = module.vision_model.embeddings(given.inputs["pixel_values"])
    elif component == "vision_chat":
        out = _internvit(module).embeddings(given.inputs["pixel_values"])
    elif component == "decoder_embed":
        out = module.model["embed_tokens"](given.inputs["input_ids"])
    elif component in ("qllama_query", "query_chat"):
        out = _queries(component, module).query_tokens.expand(given.rows, -1, -1)
    else:
        out = module.qllama.embed(given.inputs["input_ids"])
        if component == "qllama_itm":
            out = torch.cat([module.query_tokens.expand(given.rows, -1, -1), out], 1)
    return out


def run_block(component: str, module: Any, block: int, x: Tensor, given: Context) -> tuple[Tensor, Any]:
    """[B, T, H] -> [B, T, H], and a LLaMA layer's new keys and values (None from InternViT)."""
    if component == "vision":
        return module.vision_model.encoder.layers[block](x), None
    if component == "vision_chat":
        return _internvit(module).encoder.layers[block](x), None
    # A prompt of the chat decoder has no past: nothing but the order of its own positions hides anything.
    visible, count = Visible(causal=component in ("qllama_text", "decoder") and given.past is None), 0
    positions = given.inputs.get("positions")
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    if component in TOKENS_OF:
        count = _queries(component, module).query_tokens.shape[1]
    if component in ("qllama_step", "decoder") and given.past is not None:
        visible = Visible(step_mask(given.inputs["attention_mask"], x.shape[1]))
    model = module.model if component == "decoder" else _queries(component, module).qllama.model
    rotary = rotary_tables(positions, model.config, x.dtype)
    made: tuple[Tensor, KeyValue] = model.layers[block](x, rotary, visible, given.tokens, count, given.past)
    return made


def leave(component: str, module: Any, x: Tensor, given: Context) -> dict[str, Tensor]:
    """The component's outputs but keys and values, from the last block's hidden states."""
    if component == "vision":
        return {"tokens": x, "image_embed": module.clip_projector(x)}
    if component == "vision_chat":
        return {"tokens": x} if has_queries(module) else project_features(module, x)
    if component == "decoder":
        return {"logits": module.lm_head(module.model.norm(x)[:, -1:]).squeeze(1)}
    hidden = _queries(component, module).qllama.model.norm(x)
    if component == "query_chat":
        return {"query_embeds": module.model.mm_projector.mlp2(hidden)}
    if component == "qllama_query":
        return {"query_hidden": hidden, "query_embed": module.clip_projector2(hidden)}
    if component == "qllama_itm":
        return {"itm_logits": module.itm_head(hidden[:, : module.query_tokens.shape[1]]).mean(1)}
    if component == "qllama_text":
        last = (given.inputs["lengths"] - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return {"text_embed": (hidden.gather(1, last) @ module.text_projection).squeeze(1)}
    return {"logits": module.qllama.lm_head(hidden[:, -1:]).squeeze(1)}


def project_features(module: Any, x: Tensor) -> dict[str, Tensor]:
    """``visual_embeds`` of ``vision_chat`` [B, P, H], from the states of the selected layer [B, N, D]."""
    project = module.model.mm_projector
    project = project.mlp1 if has_queries(module) else project
    return {"visual_embeds": project(x[:, module.model.vision_tower.first :])}


def has_queries(module: Any) -> bool:
    """Whether the chat model has QLLaMA's queries: ``vision_chat`` gives out its last layer then."""
    return isinstance(module.model.vision_tower, QueryTower)


def _internvit(module: Any) -> Any:
    tower = module.model.vision_tower.vision_tower
    return tower.vision_model if has_queries(module) else tower


def _queries(component: str, module: Any) -> Any:
    """What holds ``qllama`` and ``query_tokens``."""
    return module.model.vision_tower.vision_tower if component == "query_chat" else module


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
