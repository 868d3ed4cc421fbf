"""Model configurations, read from the published ``config.json``. No size is hard-coded elsewhere.

InternVL-Chat has two forms (paper figure 4): on InternViT, whose weights are published, and on InternViT and
QLLaMA, whose are not. The second is as the published code has it (OpenGVLab/InternVL, read in
``internvl_chat_llava/llava/model``): ``multimodal_projector/builder.py`` has the projector ``two_mlp``; where
the tower's name contains ``internvl_14b``, ``multimodal_encoder/clip_encoder.py`` takes an InternVL without
its heads, reads features at the selected layer, and also the queries, which read the last one;
``mm_hidden_size`` is then QLLaMA's width. Assumed, for no config of it was published: layer and image size
are the first form's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, CheckpointError
from ..files.text import read_text
from .config_reading import check_chat, read_internvl, read_llama, read_vision
from .misfits import explain_folder
from .section import Section
from .shipped import no_checkpoint

NORM_TYPES = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class VisionConfig:
    """InternViT (paper section 3.2). ``image_size`` is the pixel grid of the stored position embedding.

    ``norm_type`` is ``rms_norm`` or ``layer_norm``. Norms of queries and keys are RMSNorms over all heads
    together; ``qk_norm_eps`` is theirs where it is not ``layer_norm_eps``.

    ``feature_blocks`` are not part of the published model: the numbers, from 1, of the blocks before the last
    whose outputs the component ``vision`` outputs too (:mod:`..export.features`).
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
    norm_type: str = "rms_norm"
    qk_norm_eps: float = 0.0

    def __post_init__(self) -> None:
        _divides("vision_config", self.hidden_size, self.num_attention_heads)
        blocks = tuple(self.feature_blocks)  # a list, where it was read from JSON
        if not set(blocks) <= set(range(1, self.num_hidden_layers)) or list(blocks) != sorted(set(blocks)):
            raise CheckpointError(
                f"vision_config.feature_blocks is {list(blocks)}.",
                f"Needed are rising numbers from 1 to {self.num_hidden_layers - 1}.",
            )
        object.__setattr__(self, "feature_blocks", blocks)
        object.__setattr__(self, "qk_norm_eps", self.qk_norm_eps or self.layer_norm_eps)
        if self.norm_type not in NORM_TYPES:
            raise CapabilityError(
                f"vision_config.norm_type is {self.norm_type!r}.", f"Implemented: {', '.join(NORM_TYPES)}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def to_published(self) -> dict[str, Any]:
        """The ``vision_config`` of a ``config.json``; later keys only where they differ."""
        later = {"feature_blocks": (), "norm_type": "rms_norm", "qk_norm_eps": self.layer_norm_eps}
        data = {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


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

    @property
    def key_width(self) -> int:
        """Width of all key heads, or value heads, together: every query head has one of its own."""
        return self.hidden_size


@dataclass(frozen=True)
class InternVLConfig:
    """InternVL-C and InternVL-G.

    ``contrastive_only`` is not a key of ``config.json``: files of the older layout have InternVL-C alone,
    without queries, cross-attention, ITM head and lm_head.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    qllama: QLlamaConfig = field(default_factory=QLlamaConfig)
    clip_embed_dim: int = 768
    attn_pool_num_heads: int = 16
    num_query_token: int = 96
    cross_attention_frequency: int = 2
    label_smoothing: float = 0.0
    contrastive_only: bool = False
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its ``config.json`` that the reader does not know."""

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
        """Read a published ``config.json``; CheckpointError for values that this model does not have.

        ``force_image_size`` means the position embedding in the file already has that grid.
        """
        for part in ("vision_config", "qllama_config"):
            if not isinstance(data.get(part), dict):
                raise CheckpointError(
                    f"{source} is not an InternVL config.",
                    f"It has no {part!r} section.",
                    "Point --model at a folder of the InternVL-14B-224px layout.",
                )
        check_untied(data, source, "the top level")
        check_untied(data["qllama_config"], source, "qllama_config")
        s = Section(data, source)
        vision, qllama = s.section("vision_config"), s.section("qllama_config")
        own = read_internvl(s, cls, qllama)
        tower = read_vision(vision, VisionConfig)
        if s.get("force_image_size"):
            tower["image_size"] = s.integer("force_image_size")
        decoder = QLlamaConfig(**read_llama(qllama, QLlamaConfig))
        unknown = (*s.unknown(), *vision.unknown(), *qllama.unknown())
        return cls(VisionConfig(**tower), decoder, **own, unknown_keys=unknown)

    @classmethod
    def load(cls, path: Path) -> InternVLConfig:
        """Read ``path`` (a ``config.json``)."""
        return cls.from_published(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path`` (a ``config.json``); CheckpointError where there is none."""
    try:
        data = json.loads(read_text(path, CheckpointError))
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise no_checkpoint(path.parent) from error
        why, fix = explain_folder(path.parent) or ("The model's sizes are read from it.", f"Add {path}.")
        raise CheckpointError(f"No {path.name} in {path.parent}.", why, fix) from error
    except (ValueError, RecursionError) as error:
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
            "InternVL's lm_head is a separate tensor; tying would overwrite the embeddings.",
            'Set "tie_word_embeddings": false.',
        )


def _divides(where: str, width: int, heads: int) -> None:
    if heads <= 0 or width % heads:
        raise CheckpointError(f"{where}: width {width} does not split over {heads} heads.")


_LLAVA = ("mm_hidden_size", "mm_projector_type", "mm_vision_tower", "mm_image_size", "vision_config",
          "mm_vision_select_layer", "mm_vision_select_feature")  # fmt: skip
VICUNA_7B = QLlamaConfig(vocab_size=32000, rms_norm_eps=1e-5, max_position_embeddings=4096)
VICUNA_13B = QLlamaConfig(5120, 40, 40, 13824, 32000, 1e-5, max_position_embeddings=4096)
TOWER_CONFIG = "vision_tower_config.json"
IMAGE_SIZE = 336
MLP, TWO_MLP = "mlp2x_gelu", "two_mlp"
"""Projectors: of InternViT's features, and one each for them and for QLLaMA's queries."""
_FEATURES = ("patch", "cls_patch")


@dataclass(frozen=True)
class InternViTConfig:
    """An InternViT alone (the layout of InternViT-6B-224px)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its ``config.json`` that the reader does not know."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.vision.image_size

    def to_published(self) -> dict[str, Any]:
        """The ``config.json`` of the published layout."""
        return {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **self.vision.to_published(),
            "hidden_act": "gelu",
        }

    @classmethod
    def from_published(cls, data: dict[str, Any], source: str = "config.json") -> InternViTConfig:
        """Read a published ``config.json``; CheckpointError for values that this model does not have."""
        s = Section(data, source)
        vision = VisionConfig(**read_vision(s, VisionConfig))
        return cls(vision, s.unknown())


@dataclass(frozen=True)
class ChatConfig:
    """InternVL-Chat: a vision tower, two-layer projectors and a LLaMA decoder (paper section 3.3).

    Args:
        tower: the vision tower as stored: an InternViT, or an InternVL, whose queries the decoder reads too.
            Its ``image_size`` is the grid of the stored position embedding.
        decoder: LLaMA's sizes.
        image_size: side of the images in pixels; the position embedding is resized to it.
        select_layer: which of InternViT's L + 1 hidden states (the embeddings are the first) is read; QLLaMA
            reads the last.
        select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.
        image_aspect_ratio: ``pad``: images are padded to squares; else they are resized as the preprocessor
            says.
        unknown_keys: keys of ``config.json`` that the reader does not know.

    Raises:
        CheckpointError: the tower has no such state, or the images do not split into patches.
    """

    tower: VisionConfig | InternVLConfig = field(default_factory=VisionConfig)
    decoder: QLlamaConfig = VICUNA_7B
    image_size: int = IMAGE_SIZE
    select_layer: int = -4
    select_feature: str = "patch"
    image_aspect_ratio: str = "pad"
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        states = self.vision.num_hidden_layers + 1
        if not -states <= self.select_layer < states:
            raise CheckpointError(
                f"mm_vision_select_layer is {self.select_layer}.", f"The vision tower has {states} states."
            )
        if self.select_feature not in _FEATURES:
            raise CheckpointError(
                f"mm_vision_select_feature is {self.select_feature!r}.", f"Known: {', '.join(_FEATURES)}."
            )
        if self.image_size < 1 or self.image_size % self.vision.patch_size:
            raise CheckpointError(
                f"Images of {self.image_size} pixels do not split into patches of {self.vision.patch_size}.",
                "The size is read from preprocessor_config.json.",
            )

    @property
    def llama(self) -> QLlamaConfig:
        """The decoder, as :attr:`InternVLConfig.llama`."""
        return self.decoder

    @property
    def vision(self) -> VisionConfig:
        """InternViT, as stored."""
        return self.tower if isinstance(self.tower, VisionConfig) else self.tower.vision

    @property
    def queries(self) -> InternVLConfig | None:
        """The InternVL whose QLLaMA is run; None where the tower is an InternViT."""
        return self.tower if isinstance(self.tower, InternVLConfig) else None

    @property
    def read_blocks(self) -> int:
        """Number of InternViT's blocks before the features are read."""
        return self.select_layer % (self.vision.num_hidden_layers + 1)

    @property
    def vision_blocks(self) -> int:
        """How many of InternViT's blocks are run."""
        return self.vision.num_hidden_layers if self.queries else self.read_blocks

    @property
    def num_tokens(self) -> int:
        """Tokens of one image in InternViT: patches and the class token."""
        return (self.image_size // self.vision.patch_size) ** 2 + 1

    @property
    def num_features(self) -> int:
        """Visual embeddings of one image that are features of the selected layer."""
        return self.num_tokens - (self.select_feature == "patch")

    @property
    def num_queries(self) -> int:
        """Visual embeddings of one image that QLLaMA's queries make; they come first."""
        return self.queries.num_query_token if self.queries else 0

    @property
    def num_visual(self) -> int:
        """Visual embeddings of one image: the rows of an image placeholder in the prompt."""
        return self.num_queries + self.num_features

    def to_published(self) -> dict[str, Any]:
        """The ``config.json`` of the LLaVA layout, and two keys that are not of it.

        ``mm_image_size`` says the images' size where no preprocessor does, ``vision_config`` the tower's.
        """
        queries = self.queries
        return {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            **asdict(self.decoder),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "mm_hidden_size": queries.qllama.hidden_size if queries else self.vision.hidden_size,
            "mm_projector_type": TWO_MLP if queries else MLP,
            "mm_vision_tower": "internvl_14b_224px" if queries else "intern_vit_6b_224px",
            "mm_vision_select_layer": self.select_layer,
            "mm_vision_select_feature": self.select_feature,
            "mm_image_size": self.image_size,
            "vision_config": (queries or self.vision).to_published(),
            "image_aspect_ratio": self.image_aspect_ratio,
        }

    @classmethod
    def from_published(
        cls,
        data: dict[str, Any],
        source: str = "config.json",
        tower: VisionConfig | InternVLConfig | None = None,
        image_size: int | None = None,
    ) -> ChatConfig:
        """Read a LLaVA ``config.json``.

        Args:
            data: its content.
            source: its name in messages.
            tower: the vision tower's sizes; None: from a ``vision_config`` section, else those published.
            image_size: side of the images; None: ``mm_image_size``, else 336.

        Raises:
            CheckpointError: a value that this model does not have.
            CapabilityError: the model has another projector.
        """
        check_untied(data, source, "the top level")
        s = Section(data, source)
        ratio, decoder = check_chat(s), QLlamaConfig(**read_llama(s, QLlamaConfig))
        section, unknown = s.object("vision_config"), list(s.unknown())
        if tower is None and section is not None:
            whole = _whole_tower(data, section, f"{source}: vision_config")
            tower, unknown = _tower_of(whole), [*unknown, *whole.unknown_keys]
        tower = tower or _tower_kind(data, source)()
        own = tower.hidden_size if isinstance(tower, VisionConfig) else tower.qllama.hidden_size
        width = data.get("mm_hidden_size", own)
        if width != own:
            raise CheckpointError(
                f"{source} does not fit its vision tower.",
                f"mm_hidden_size is {width}, the tower's width {own}.",
                f"Put the tower's own config next to it, as {TOWER_CONFIG}.",
            )
        return cls(
            tower,
            decoder,
            image_size or s.integer("mm_image_size", IMAGE_SIZE),
            s.integer("mm_vision_select_layer", -4, least=-1024, most=1024),
            s.text("mm_vision_select_feature", "patch"),
            ratio,
            tuple(key for key in unknown if key not in _LLAVA),
        )


def tower_from_published(
    chat: dict[str, Any], data: dict[str, Any], source: str
) -> VisionConfig | InternVLConfig:
    """:func:`_whole_tower`, an InternViT as its sizes."""
    return _tower_of(_whole_tower(chat, data, source))


def _whole_tower(chat: dict[str, Any], data: dict[str, Any], source: str) -> InternViTConfig | InternVLConfig:
    """A vision tower's own ``config.json``, of the kind that the projector of the ``chat`` config goes with.

    Raises:
        CheckpointError: it is of the other form, or has a value that this model does not.
        CapabilityError: the projector is not one of InternVL-Chat's.
    """
    kind = _tower_kind(chat, source)
    if (kind is InternVLConfig) != ("qllama_config" in data):
        has, needs = ("InternVL", "InternViT") if kind is VisionConfig else ("InternViT", "InternVL")
        raise CheckpointError(
            f"{source} is the config of an {has}.",
            f"The projector {chat.get('mm_projector_type', MLP)} reads an {needs}.",
            "Correct mm_projector_type, or put the config of the tower it was trained with there.",
        )
    if kind is InternVLConfig:
        return InternVLConfig.from_published(data, source)
    return InternViTConfig.from_published(data, source)


def _tower_of(config: InternViTConfig | InternVLConfig) -> VisionConfig | InternVLConfig:
    return config.vision if isinstance(config, InternViTConfig) else config


def _tower_kind(chat: dict[str, Any], source: str) -> type[VisionConfig] | type[InternVLConfig]:
    projector = chat.get("mm_projector_type", MLP)
    if projector not in (MLP, TWO_MLP):
        raise CapabilityError(
            f"{source} has the projector {projector!r}.",
            f"InternVL-Chat has {MLP} on InternViT, and {TWO_MLP} on InternViT and QLLaMA.",
        )
    return VisionConfig if projector == MLP else InternVLConfig


def tower_configs(folder: Path, data: dict[str, Any]) -> list[Path]:
    """Possible paths of the config of a chat checkpoint's vision tower."""
    name = Path(str(data.get("mm_vision_tower") or "")).name
    paths = [folder / name / "config.json", folder.absolute().parent / name / "config.json"]
    return [folder / TOWER_CONFIG, *(paths if name not in ("", ".", "..") else [])]
