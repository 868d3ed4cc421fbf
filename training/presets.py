"""Presets of training runs: the model's sizes and the schedule of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..models.config import ChatConfig, InternVLConfig, QLlamaConfig, VisionConfig
from ..models.decoder_config import DecoderConfig
from ..models.rope_config import RopeConfig
from ..models.tiles_config import TilesConfig
from ..synthetic.scenes import PAIRS


@dataclass(frozen=True)
class Stage:
    """One stage of training; the paper's section 3.3 has two of them.

    Args:
        name: for the log and checkpoints.
        loss: ``contrastive`` (stage 1), ``generative`` (stage 2: itc + itm + itg), ``answers`` (stage 3),
            ``places`` (contents of a tile's places), ``lines`` (all texts of a tile) or ``albums`` (answers
            about up to six pictures at a time, too).
        steps: optimiser steps.
        batch: images a step.
        lr: peak learning rate of AdamW; linear warm-up, then a cosine to zero.
        matrix_lr: the same of Muon, which trains the matrices of the blocks.
        warmup: steps of warm-up.
        near: share of a batch that differs from its neighbour in one attribute (hard negatives).
        pairs: share of scenes with two objects and a relation.
        focus: share of the caption tokens that are not predicted, words of relation aside.
        trainable: name patterns of the parameters that learn; the others are frozen.
    """

    name: str
    loss: Literal["contrastive", "generative", "answers", "places", "lines", "albums"]
    steps: int
    batch: int
    lr: float
    matrix_lr: float
    warmup: int
    near: float = 0.5
    pairs: float = PAIRS
    focus: float = 0.0
    trainable: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Preset:
    """A model trained from scratch on drawn scenes."""

    name: str
    model: InternVLConfig
    stages: tuple[Stage, ...]
    seed: int = 0
    chinese: float = 0.25
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0


# Every width is a multiple of 16 and every head at least 32 wide: FP8 and INT8 kernels ask for that.
_NANO = InternVLConfig(
    vision=VisionConfig(
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=112,
        patch_size=14,
    ),
    qllama=QLlamaConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=352,
        vocab_size=512,
        max_position_embeddings=128,
    ),
    clip_embed_dim=64,
    attn_pool_num_heads=4,
    num_query_token=16,
)

# Relations come first: in this order 150 steps were enough. A model that had learnt shapes and colours by
# contrast before stayed at chance for 240 steps; that was tried with pairs that differ in size only.
# The published stage 2 freezes InternViT and LLaMA, which come trained. Here LLaMA has read nothing but
# captions by then, so all of it is trained further.
NANO = Preset(
    name="nano",
    model=_NANO,
    stages=(
        Stage("relations", "generative", 200, 64, 1.5e-3, 0.02, warmup=20, pairs=0.8, focus=0.9),
        Stage("stage1", "contrastive", 500, 64, 1.5e-3, 0.02, warmup=40),
        Stage("stage2", "generative", 3500, 64, 1.5e-3, 0.02, warmup=40),
    ),
)

PRESETS = {NANO.name: NANO}


@dataclass(frozen=True)
class ChatPreset:
    """A chat model whose vision tower is that of a trained InternVL, and stays as it is.

    ``turns`` is the most that a training dialogue has.
    """

    name: str
    model: ChatConfig
    stage: Stage
    seed: int = 0
    turns: int = 5
    weight_decay: float = 0.05


# The last hidden state is read through a head by InternVL; the one before it keeps more of each patch.
NANO_CHAT = ChatPreset(
    name="nano-chat",
    model=ChatConfig(
        tower=_NANO.vision,
        decoder=QLlamaConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=352,
            vocab_size=512,
            rms_norm_eps=1e-5,
            max_position_embeddings=512,
        ),
        image_size=_NANO.vision.image_size,
        select_layer=-2,
    ),
    stage=Stage(
        "stage3",
        "answers",
        1100,
        64,
        1.5e-3,
        0.02,
        warmup=40,
        pairs=0.6,
        trainable=(
            "model.mm_projector.*",
            "model.embed_tokens.*",
            "model.layers.*",
            "model.norm.*",
            "lm_head.*",
        ),
    ),
)


@dataclass(frozen=True)
class TilesPreset:
    """A model of InternVL 2.5's form, trained from scratch on signs (:mod:`..synthetic.signs`).

    Args:
        name: of the preset.
        model: sizes; vocabulary and special tokens are those of the preset's tokenizer.
        places: the tower and the projector learn the content of each place of a tile, with a head
            that is thrown away afterwards.
        lines: the projector and the decoder learn to read all texts of one tile.
        answers: they learn the answers of dialogues about pictures of several tiles.
        albums: the same, and one batch of three has dialogues about two to six small pictures.
        seed: of weights and data.
        texts: the most texts in a tile that is read whole; reached half-way.
        turns: the most questions of a dialogue.
        single: share of the dialogues whose pictures are shown as one tile.
        weight_decay: of matrices.
        max_grad_norm: gradients are clipped to it.
    """

    name: str
    model: TilesConfig
    places: Stage
    lines: Stage
    answers: Stage
    albums: Stage
    seed: int = 0
    texts: int = 6
    turns: int = 8
    single: float = 1 / 16
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return self.places, self.lines, self.answers, self.albums


_READS = ("model.mlp1.*", "model.language_model.*")
# Vocabulary and special tokens: training/tokenizer.py. A test holds them to each other.
#
# Why this order: from dialogues alone the decoder did not begin to read within 175 steps, be its visual
# tokens ever so perfect: too few of its answers are characters. Reading whole tiles, 150 steps were enough.
NANO_TILES = TilesPreset(
    name="nano-tiles",
    model=TilesConfig(
        vision=VisionConfig(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=64,
            patch_size=8,
        ),
        decoder=DecoderConfig(
            kind="qwen2",
            vocab_size=848,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=384,
            max_position_embeddings=1024,
            rope=RopeConfig(1e6),
            qkv_bias=True,
        ),
        image_size=64,
        max_tiles=6,
        template="internvl2_5",
    ),
    places=Stage(
        "places",
        "places",
        600,
        32,
        4e-3,
        0.04,
        warmup=30,
        trainable=("model.vision_model.*", "model.mlp1.*", "model.language_model.lm_head.*", "[!m]*"),
    ),
    lines=Stage("lines", "lines", 500, 32, 3e-3, 0.03, warmup=30, trainable=_READS),
    answers=Stage("answers", "answers", 4000, 18, 2e-3, 0.02, warmup=40, trainable=_READS),
    albums=Stage("albums", "albums", 1400, 18, 1.2e-3, 0.012, warmup=40, trainable=_READS),
)
