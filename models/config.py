"""Model configuration, read from the published ``config.json``. No size is hard-coded elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


@dataclass(frozen=True)
class VisionConfig:
    """InternViT (paper section 3.2). ``image_size`` is the pixel grid of the stored position embedding.

    ``feature_blocks`` are no part of the published model: the numbers, from 1, of the blocks before the last
    whose outputs the component ``vision`` gives out too (:mod:`..export.features`).
    """

    hidden_size: int = 3200
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    image_size: int = 224
    patch_size: int = 14
    qkv_bias: bool = False
    qk_normalization: bool = True
    layer_norm_eps: float = 1e-6
    feature_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _divides("vision_config", self.hidden_size, self.num_attention_heads)
        blocks = tuple(self.feature_blocks)  # a list, where it was read from JSON
        if not set(blocks) <= set(range(1, self.num_hidden_layers)) or list(blocks) != sorted(set(blocks)):
            raise CheckpointError(
                f"vision_config.feature_blocks is {list(blocks)}.",
                f"Needed are rising numbers from 1 to {self.num_hidden_layers - 1}.",
            )
        object.__setattr__(self, "feature_blocks", blocks)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def to_published(self) -> dict[str, Any]:
        """The ``vision_config`` of a ``config.json``; ``feature_blocks`` only where there are some."""
        kept = {"feature_blocks": list(self.feature_blocks)} if self.feature_blocks else {}
        return {**{k: v for k, v in asdict(self).items() if k != "feature_blocks"}, **kept}


@dataclass(frozen=True)
class QLlamaConfig:
    """QLLaMA: a LLaMA with learnable queries; which layers cross-attend is :class:`InternVLConfig`'s."""

    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 11008
    vocab_size: int = 49954
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        _divides("qllama_config", self.hidden_size, self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class InternVLConfig:
    """InternVL-C / InternVL-G.."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qllama: QLlamaConfig = field(default_factory=QLlamaConfig)
    clip_embed_dim: int = 768
    attn_pool_num_heads: int = 16
    num_query_token: int = 96
    cross_attention_frequency: int = 2
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, width in (("vision", self.vision.hidden_size), ("qllama", self.qllama.hidden_size)):
            _divides(f"attention pooling over {name}", width, self.attn_pool_num_heads)

    @property
    def llama(self) -> QLlamaConfig:
        """The language model: QLLaMA."""
        return self.qllama

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.vision.image_size

    def has_cross_attention(self, layer: int) -> bool:
        """Whether QLLaMA layer ``layer`` attends to the image."""
        return layer % self.cross_attention_frequency == 0

    def to_published(self) -> dict[str, Any]:
        """The ``config.json`` of the published layout."""
        return {
            "architectures": ["InternVLModel"],
            "model_type": "internvl",
            "vision_config": {**self.vision.to_published(), "hidden_act": "gelu"},
            "qllama_config": {
                **asdict(self.qllama),
                "hidden_act": "silu",
                "model_type": "llama",
                "tie_word_embeddings": False,
            },
            "clip_embed_dim": self.clip_embed_dim,
            "attn_pool_num_heads": self.attn_pool_num_heads,
            "num_query_token": self.num_query_token,
            "cross_attention_frequency": self.cross_attention_frequency,
            "label_smoothing": self.label_smoothing,
            "tie_word_embeddings": False,
        }

    @classmethod
    def from_published(cls, data: dict[str, Any], source: str = "config.json") -> InternVLConfig:
        """Read a published ``config.json``; CheckpointError where it says what this model is not.

        ``force_image_size`` means the position embedding in the file already has that grid.
        """
        for part in ("vision_config", "qllama_config"):
            if not isinstance(data.get(part), dict):
                raise CheckpointError(
                    f"{source} is not an InternVL config.",
                    f"It has no {part!r} section.",
                    "Point --model at a folder of the InternVL-14B-224px layout.",
                )
        vision, qllama = dict(data["vision_config"]), data["qllama_config"]
        check_untied(data, source, "the top level")
        check_untied(qllama, source, "qllama_config")
        require(vision, "hidden_act", "gelu", f"{source}: vision_config")
        check_llama(qllama, source, "qllama_config")
        if data.get("force_image_size"):
            vision["image_size"] = data["force_image_size"]
        try:
            return cls(
                vision=VisionConfig(**known(VisionConfig, vision)),
                qllama=QLlamaConfig(**known(QLlamaConfig, qllama)),
                **{k: v for k, v in known(cls, data).items() if k not in ("vision", "qllama")},
            )
        except TypeError as error:
            raise CheckpointError(f"{source} cannot be read.", str(error), "Download it again.") from error

    @classmethod
    def load(cls, path: Path) -> InternVLConfig:
        """Read ``path`` (a ``config.json``)."""
        return cls.from_published(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path`` (a ``config.json``); CheckpointError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise CheckpointError(
                f"No checkpoint at {path.parent}.",
                "There is no such folder.",
                "Check the path given as --model.",
            ) from error
        raise CheckpointError(
            f"No {path.name} in {path.parent}.", "The model's sizes are read from it.", f"Add {path}."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON.", str(error), "Download it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} is not an InternVL config.", "It holds no JSON object.", "Download it again."
        )
    return data


def check_untied(section: dict[str, Any], source: str, where: str) -> None:
    """CheckpointError where ``section`` ties lm_head to the embeddings."""
    if section.get("tie_word_embeddings", False):
        raise CheckpointError(
            f"{source} ties the word embeddings at {where}.",
            "InternVL's lm_head is a tensor of its own; tying would overwrite the embeddings.",
            'Set "tie_word_embeddings": false.',
        )


def check_llama(section: dict[str, Any], source: str, where: str) -> None:
    """CheckpointError where ``section`` asks for a LLaMA that is not the published models'."""
    require(section, "hidden_act", "silu", f"{source}: {where}")
    if section.get("rope_scaling") is not None:
        raise CheckpointError(
            f"{source} asks for rope_scaling.", "The decoder uses plain rotary embeddings.", "Remove it."
        )
    heads = section.get("num_attention_heads")
    if section.get("num_key_value_heads") not in (None, heads):
        raise CheckpointError(
            f"{source} asks for grouped-query attention.",
            f"num_key_value_heads is {section['num_key_value_heads']}, num_attention_heads {heads}.",
            "The decoder has one key-value head for each query head.",
        )


def known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """What ``data`` says of the fields of dataclass ``cls``; TypeError for a size that is no whole number."""
    types = {f.name: f.type for f in fields(cls)}
    found = {k: v for k, v in data.items() if k in types and v is not None}
    for key, value in found.items():
        if types[key] == "int" and type(value) is not int:
            raise TypeError(f"{key} is {value!r}, not a whole number.")
    return found


def require(section: dict[str, Any], key: str, value: str, where: str) -> None:
    """CheckpointError where ``section`` has ``key``, and not as ``value``."""
    if section.get(key, value) != value:
        raise CheckpointError(f"{where}.{key} is {section[key]!r}.", f"This model is defined with {value!r}.")


def _divides(where: str, width: int, heads: int) -> None:
    if heads <= 0 or width % heads:
        raise CheckpointError(f"{where}: width {width} does not split over {heads} heads.")
