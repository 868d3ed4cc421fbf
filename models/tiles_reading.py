"""Reading the ``config.json`` of InternVL 1.1 to 3.5, in both published layouts.

OpenGVLab's (``model_type: internvl_chat``) has sections ``vision_config`` and ``llm_config``; that of
transformers (``internvl``) has ``vision_config`` and ``text_config``, other keys, and other values where a
key is absent. A key that changes the computation is obeyed, or refused by its name. A bundle's manifest holds
the first layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, CheckpointError
from ..files.text import read_text
from .config import VisionConfig
from .config_reading import VISION_HARMLESS, read_vision
from .decoder_config import DecoderConfig
from .decoder_reading import kind_of, read_decoder
from .misfits import refuse_quantised
from .section import Section
from .tiles_config import TilesConfig

IMAGE_TOKEN = "<IMG_CONTEXT>"
"""The token of one visual embedding in a prompt."""
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "img_context_token_id")
NATIVE_IMAGE_TOKEN = 151667
"""The image token of the layout of transformers where its config names none."""
_FLASH = ("flash_mode", "is_flash_model", "flash_relative_threshold", "flash_absolute_threshold")

# fmt: off
_CHAT_HARMLESS = frozenset({
    "hidden_size", "image_fold", "image_seq_length", "loss_reduction", "num_image_token",
    "system_message", "use_backbone_lora", "use_llm_lora", "vocab_size",
})
# fmt: on


def read_tiles(data: dict[str, Any], source: str = "config.json", eos: tuple[int, ...] = ()) -> TilesConfig:
    """Read a ``config.json`` of either layout.

    Args:
        data: its content.
        source: its name in messages.
        eos: tokens that end an answer by other files.

    Raises:
        CheckpointError: a value that cannot be right, or a section that is missing.
        CapabilityError: a form that is not implemented, said by name.
    """
    s = Section(data, source)
    _refuse_flash(s)
    for place, section in (("", data), *((k, v) for k, v in data.items() if isinstance(v, dict))):
        if section.get("quantization_config"):
            refuse_quantised(section["quantization_config"], f"{source}: {place}" if place else source)
    s.choice("model_type", "internvl_chat", "internvl")
    return (_read_native if data.get("model_type") == "internvl" else _read_opengvlab)(s, eos)


def load_tiles_config(data: dict[str, Any], source: str, folder: Path) -> TilesConfig:
    """As :func:`read_tiles`, completed from other files of ``folder``: the image token, and more stop tokens.

    Raises:
        CheckpointError: as there, or the image token is another one than the tokenizer's.
        CapabilityError: a form that is not implemented.
    """
    eos = _read(folder / "generation_config.json").get("eos_token_id")
    listed = eos if isinstance(eos, list) else [eos]
    config = read_tiles(data, source, tuple(i for i in listed if type(i) is int and i >= 0))
    token = special_token(folder, IMAGE_TOKEN)
    if token is None:
        return config
    if any(data.get(key) is not None for key in _IMAGE_TOKENS) and token != config.image_token_id:
        raise CheckpointError(
            f"{source} and the tokenizer next to it disagree.",
            f"The image token is {config.image_token_id} in the config, {IMAGE_TOKEN} is {token}.",
            "Use the config.json and the tokenizer that were published with these weights.",
        )
    if token >= config.decoder.vocab_size:
        raise CheckpointError(
            f"The tokenizer next to {source} is another model's.",
            f"Its {IMAGE_TOKEN} is {token}, the decoder has the tokens 0 to {config.decoder.vocab_size - 1}.",
            "Use the tokenizer that was published with these weights.",
        )
    return replace(config, image_token_id=token)


def special_token(folder: Path, token: str) -> int | None:
    """The id of an added token by the tokenizer's files in ``folder``; None where none of them names it."""
    added = _read(folder / "added_tokens.json").get(token)
    if type(added) is int:
        return added
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and entry.get("content") == token and str(number).isdecimal():
            return int(number)
    listed = _read(folder / "tokenizer.json").get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and entry.get("content") == token and type(entry.get("id")) is int:
            return int(entry["id"])
    return None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(read_text(path, CheckpointError))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON.", str(error), "Download it again.") from error
    return data if isinstance(data, dict) else {}


def is_tiles(data: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of this family; ``internvl`` is also InternVL-C's, which has a QLLaMA."""
    kind = str(data.get("model_type", ""))
    return kind.startswith("internvl_") or (kind == "internvl" and "text_config" in data)


def refuse_flash(source: str, why: str) -> None:
    """CapabilityError that explains InternVL3.5-Flash."""
    raise CapabilityError(
        f"{source} is an InternVL3.5-Flash.",
        f"{why} Its router gives a tile 256 or 64 tokens, depending on the image: not implemented.",
        "Give the InternVL3.5 checkpoint of the same size without -Flash.",
    )


def _refuse_flash(s: Section) -> None:
    keys = [key for key in _FLASH if s.get(key)]
    if keys or str(s.data.get("model_type", "")).startswith("internvl_flash"):
        refuse_flash(s.where, f"It has {keys[0]}." if keys else "Its model_type says so.")


def _read_opengvlab(s: Section, eos: tuple[int, ...]) -> TilesConfig:
    vision, llm = s.section("vision_config"), s.section("llm_config")
    tower = VisionConfig(**read_vision(vision, VisionConfig))
    dynamic = s.flag("dynamic_image_size", False)
    s.only("pad2square", False, why="Images padded to a square are not implemented.")
    older = s.get("ps_version") is None
    s.ignore(_CHAT_HARMLESS)
    s.ignore(("min_dynamic_patch", "max_dynamic_patch"))
    config = TilesConfig(
        vision=tower,
        decoder=_tied(read_decoder(llm, kind_of(llm), (*s.tokens("eos_token_id"), *eos)), s),
        image_size=s.integer("force_image_size", tower.image_size, most=1 << 14),
        # Neither key: InternVL-Chat 1.1 or 1.2, whose class reads the fourth state from the end.
        select_layer=_layer(s, "select_layer", -4 if older else -1),
        factor=_factor(s),
        shuffle=s.choice("ps_version", "v1", "v2"),
        image_token_id=_image_token(s),
        template=s.text("template"),
        system_message=None if s.get("system_message") is None else s.text("system_message"),
        min_tiles=s.integer("min_dynamic_patch", 1, most=1024) if dynamic else 1,
        max_tiles=s.integer("max_dynamic_patch", 6, most=1024) if dynamic else 1,
        thumbnail=s.flag("use_thumbnail", False),
    )
    return replace(config, unknown_keys=(*s.unknown(), *vision.unknown(), *llm.unknown()))


def _read_native(s: Section, eos: tuple[int, ...]) -> TilesConfig:
    vision, text = s.section("vision_config"), s.section("text_config")
    tower = _read_native_vision(vision)
    s.choice("vision_feature_select_strategy", "default")
    s.choice("projector_hidden_act", "gelu")
    s.ignore(_CHAT_HARMLESS)
    decoder = read_decoder(text, kind_of(text, "qwen2"), (*s.tokens("eos_token_id"), *eos))
    # Only the top level can say that they are not tied: the class ties them where it says nothing.
    decoder = _tied(replace(decoder, tied=decoder.tied or None), s)
    default = NATIVE_IMAGE_TOKEN if decoder.vocab_size > NATIVE_IMAGE_TOKEN else None
    token = _image_token(s)
    config = TilesConfig(
        vision=tower,
        decoder=decoder,
        image_size=tower.image_size,
        select_layer=_layer(s, "vision_feature_layer", -1),
        factor=_factor(s),
        image_token_id=default if token is None else token,
        layout="native",
    )
    return replace(config, unknown_keys=(*s.unknown(), *vision.unknown(), *text.unknown()))


def _tied(decoder: DecoderConfig, top: Section) -> DecoderConfig:
    """Merged with the top level's ``tie_word_embeddings``: one yes is enough."""
    if decoder.tied or top.get("tie_word_embeddings") is None:
        return decoder
    return replace(decoder, tied=top.flag("tie_word_embeddings", False))


def _image_token(s: Section) -> int | None:
    ids = {key: s.token(key) for key in _IMAGE_TOKENS if s.token(key) is not None}
    if len({*ids.values()}) > 1:
        raise CheckpointError(
            f"{s.where} names two image tokens.", ", ".join(f"{k} is {v}" for k, v in ids.items()) + "."
        )
    return next(iter(ids.values()), None)


def _layer(s: Section, key: str, default: int) -> int:
    return s.integer(key, default, least=-1024, most=1024)


def _factor(s: Section) -> int:
    ratio = s.number("downsample_ratio", 0.5)
    factor = round(1 / ratio) if ratio > 0 else 0
    if factor < 1 or abs(factor * ratio - 1) > 1e-6:
        s.bad("downsample_ratio", "1 divided by a whole number")
    return factor


def _read_native_vision(s: Section) -> VisionConfig:
    """The tower in the layout of transformers; absent keys mean the 300M's form without biases of q, k, v."""
    s.choice("hidden_act", "gelu")
    s.only("num_channels", 3, why="Images have three channels.")
    s.only("use_absolute_position_embeddings", True, why="The tower has position embeddings.")
    s.only("use_mean_pooling", True, why="A norm after the tower's last block is not implemented.")
    s.ignore((*VISION_HARMLESS, "use_mask_token"))
    return VisionConfig(
        hidden_size=s.integer("hidden_size", 1024),
        num_hidden_layers=s.integer("num_hidden_layers", 24, most=1024),
        num_attention_heads=s.integer("num_attention_heads", 16, most=4096),
        intermediate_size=s.integer("intermediate_size", 4096),
        image_size=_square(s, "image_size", 448),
        patch_size=_square(s, "patch_size", 14),
        qkv_bias=s.flag("attention_bias", False),
        qk_normalization=s.flag("use_qk_norm", False),
        layer_norm_eps=s.number("layer_norm_eps", 1e-6),
        norm_type=s.choice("norm_type", "layer_norm", "rms_norm"),
        qk_norm_eps=1e-6,  # independent of layer_norm_eps
    )


def _square(s: Section, key: str, default: int) -> int:
    """A side, which may be given as two equal ones."""
    value = s.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= 1 << 14:
        s.bad(key, "one side, or two equal ones, in pixels")
    return value
