"""Answers of InternVL3-1B on the CPU against ``transformers``: the sizes as published, the weights made up.

A question about one tile of 448 x 448 pixels. The first token has the tower and the prompt of 256 visual
embeddings and some words in it; the time of a further token is that of all less the first, in the same round.
``transformers`` holds the same weights. Its ``bf16`` multiplies in bf16, the runtime's in fp32: ONNX Runtime
has no such kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ivl_export.arrays import Floats, Ids
from ivl_export.benchmarks.runtime.decoding import TRANSFORMERS, Generate, compared
from ivl_export.benchmarks.runtime.measured import Comparison
from ivl_export.benchmarks.runtime.models import TILES, Setting
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.tiles_config import TilesConfig
from ivl_export.models.tiles_layout import NEWER, sources
from ivl_export.profiles.measure.baseline import torch_threads
from ivl_export.runtime import InternVLChat

WORDS = 32
"""Tokens of the question, besides those of the tile."""
PRECISIONS = ("plain", "fp32", "int8")
NAMES = {"plain": "fp32", "fp32": "bf16", "int8": "int8"}
"""How the weights are stored, by the bundle's precision (:data:`.models.PRECISIONS`)."""


def measure(setting: Setting) -> Iterator[Comparison]:
    """The first token, then each further one, of one conversation."""
    models = [name for name in setting.models if name in TILES] or ["internvl3-1b"]
    with torch_threads(setting.threads):
        for name in models:
            with ExitStack() as opened:
                ways = list(generators(setting, name, opened))
                yield from compared(f"{name}, one tile and {WORDS} tokens", ways, 1, setting, ())


def generators(setting: Setting, name: str, opened: ExitStack) -> Iterator[tuple[str, str, Generate]]:
    """(name, precision, what generates) of the runtime's bundles and, if installed, of transformers."""
    config: Any = open_checkpoint(setting.checkpoint(name)).model
    pixels, ids = question(config)
    for precision in PRECISIONS:
        bundle = setting.bundle(name, precision)
        ours = opened.enter_context(InternVLChat.load(bundle, threads=setting.threads, kept_bytes=0))
        yield f"runtime {NAMES[precision]}", NAMES[precision], partial(_ours, ours, pixels, ids)
    if find_spec(TRANSFORMERS) is not None:
        for precision in ("fp32", "bf16"):
            folder = native_folder(setting, name)
            yield f"transformers {precision}", precision, theirs(folder, precision, pixels, ids)


def question(config: TilesConfig) -> tuple[Floats, Ids]:
    """``pixel_values`` [1, 3, S, S] of noise, and token ids [1, T] with the tile's placeholders first."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((1, 3, config.image_size, config.image_size), dtype=np.float32)
    words = rng.integers(3, min(config.decoder.vocab_size, 1000), WORDS)
    tile = np.full(config.num_visual, config.image_token_id)
    return pixels, np.concatenate([tile, words])[None].astype(np.int64)


def _ours(model: InternVLChat, pixels: Floats, ids: Ids, new: int) -> Ids:
    return model.generate(pixels, ids, max_new_tokens=new, min_new_tokens=new)


def theirs(folder: Path, precision: str, pixels: Floats, ids: Ids) -> Generate:
    """``generate`` of transformers' model in ``folder``."""
    import torch
    import transformers

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    tokens, tile = torch.from_numpy(ids), torch.from_numpy(pixels).to(dtype)

    @torch.inference_mode()
    def generate(new: int) -> Ids:
        out = model.generate(
            input_ids=tokens,
            pixel_values=tile,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            suppress_tokens=[model.config.image_token_id],  # the runtime never answers with it either
            eos_token_id=None,
            pad_token_id=0,
        )
        return np.asarray(out[:, tokens.shape[1] :].numpy())

    return generate


def native_folder(setting: Setting, name: str) -> Path:
    """The checkpoint ``name`` as transformers stores it, made if it is not there."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder = setting.work / f"{name}-native"
    if folder.is_dir():
        return folder
    checkpoint = open_checkpoint(setting.checkpoint(name))
    config: Any = checkpoint.model
    tensors: dict[str, torch.Tensor] = {}
    for key, source in sources(replace(config, layout="native"), (NEWER,)).items():
        whole, start = checkpoint.load(key), 0
        for part in source.parts:  # q, k and v of the tower are apart
            tensors[part.name] = whole[start : start + part.shape[0]].clone()
            start += part.shape[0]
    unfinished = folder.with_name(f".{folder.name}.part")
    unfinished.mkdir(parents=True, exist_ok=True)
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    vision, decoder = config.vision, config.decoder
    transformers.InternVLConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "attention_bias": vision.qkv_bias,
            "norm_type": vision.norm_type,
            "use_qk_norm": vision.qk_normalization,
            "layer_norm_eps": vision.layer_norm_eps,
        },
        text_config=transformers.Qwen2Config(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.intermediate_size,
            num_hidden_layers=decoder.num_hidden_layers,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_key_value_heads,
            rms_norm_eps=decoder.rms_norm_eps,
            max_position_embeddings=decoder.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope.theta},
        ).to_dict(),
        image_token_id=config.image_token_id,
        tie_word_embeddings=False,
    ).save_pretrained(unfinished)
    return unfinished.replace(folder)
