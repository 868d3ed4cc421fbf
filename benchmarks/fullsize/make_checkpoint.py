"""A seeded full-size checkpoint in a published layout, for measuring what size costs.

Written as a stream, a block of rows at a time: memory does not depend on the size. Values resemble a trained
model's where tools are sensitive to them: heavy tails, a few massive channels in the residual stream, norms
that keep activations finite. They mean nothing: the model's answers are noise.

Layouts: InternVL-14B, InternViT-6B alone, and InternVL-Chat with Vicuna-7B or -13B, on InternViT or (without
published weights) on QLLaMA too, in names, shapes and config; the files are safetensors throughout
(InternViT-6B and the chat models were published as ``.bin``).

    python -m ivl_export.benchmarks.fullsize.make_checkpoint OUT --layout chat-7b --blocks 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ivl_export.cli.scenes import draw
from ivl_export.files.write import atomic, write_text
from ivl_export.inputs.chat_template import CONTEXT, END, START, template_of
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import ADDED
from ivl_export.models.config import (
    VICUNA_7B,
    VICUNA_13B,
    ChatConfig,
    InternViTConfig,
    InternVLConfig,
)
from ivl_export.models.registry import ModelConfig, Shape, family_of, load_config
from ivl_export.models.tiles_published import PUBLISHED
from ivl_export.training.tokenizer import train_tokenizer

BLOCK_VALUES = 1 << 22
ITEM_BYTES = 2  # bf16
MASSIVE = 4
"""Channels of each residual stream that are far larger than the rest."""

SCENES = 4
"""Drawn for calibration: at full depth a sample takes about a minute on two cores."""

LAYOUTS: dict[str, ModelConfig] = {
    "internvl-14b": InternVLConfig(),
    "internvit-6b": InternViTConfig(),
    "chat-7b": ChatConfig(decoder=VICUNA_7B),
    "chat-13b": ChatConfig(decoder=VICUNA_13B),
    "chat-7b-qllama": ChatConfig(InternVLConfig(), VICUNA_7B),
    "chat-13b-qllama": ChatConfig(InternVLConfig(), VICUNA_13B),
    **PUBLISHED,
}
C = TypeVar("C", bound=Any)

# Projections back into the residual stream.
_OF_DECODERS = ("o_proj.weight", "down_proj.weight", ".wo.weight", ".w2.weight")
_RESIDUAL = (".attn.proj.weight", ".projection_layer.weight", ".mlp.fc2.weight", *_OF_DECODERS)
_EMBEDDINGS = ("class_embedding", "cls_token", "position_embedding", "position_embeddings", "query_tokens",
               "embed_tokens.weight", "tok_embeddings.weight")  # fmt: skip


def make_checkpoint(
    out: Path,
    config: ModelConfig,
    depth: int = 48,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    holes: bool = False,
    progress: Callable[[int, int], None] = lambda count, total: None,
) -> list[Path]:
    """Write shards, index and configs to ``out``; for a model that reads text, a tokenizer and scenes too.

    ``ivl-export build`` calibrates on the scenes in ``calibration/`` where no other set is given.

    Args:
        out: a folder; files of these names in it are replaced.
        config: the sizes.
        depth: layers of the model this is a slice of: residual projections are scaled by it.
        seed: a tensor depends on it, its name and its shape alone: two slices share their common layers.
        shard_bytes: largest shard (one tensor at least).
        holes: no values, only sizes: sparse files that take no disk, for steps that read no weights.
        progress: callback with bytes done and in all.

    Returns:
        The shards.
    """
    family = family_of(config)
    tensors = family.stored(config)
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    shards = list(_shards(shapes, shard_bytes))
    total, bytes_done = sum(_nbytes(s) for s in shapes.values()), 0
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < total and not holes:
        raise SystemExit(f"{out}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")
    index: dict[str, str] = {}
    paths = []
    for i, names in enumerate(shards, 1):
        path = out / f"model-{i:05}-of-{len(shards):05}.safetensors"
        with atomic(path, exclusive=True) as partial, partial.open("wb") as file:
            file.write(_header({name: shapes[name] for name in names}))
            if holes:
                file.truncate(file.tell() + sum(_nbytes(shapes[name]) for name in names))
            for name in () if holes else names:
                for rows in tensor_blocks(*tensors[name], depth, seed):
                    file.write(rows.view(torch.uint8).numpy().data)
                    bytes_done += rows.numel() * ITEM_BYTES
                    progress(bytes_done, total)
        index.update(dict.fromkeys(names, path.name))
        paths.append(path)
    _json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _json(out / "config.json", {**config.to_published(), "torch_dtype": "bfloat16"})
    settings = ImageSettings(config.image_size)
    for name, content in family.companions(config).items():
        _json(out / name, content)
    settings = family.image_settings(config, settings)
    settings.save(out / "preprocessor_config.json")
    if family.vocabulary(config):
        (out / "tokenizer.model").write_bytes(train_tokenizer())
        if template := config.to_published().get("template"):
            _json(out / ADDED, special_tokens(template, config))
        draw(out / "calibration", SCENES, seed, "train", "en", force=True)
    return paths


def special_tokens(template: str, config: Any) -> dict[str, int]:
    """The special tokens of prompts, as ``added_tokens.json`` has them: the last ids, and the image token."""
    image = config.image_token_id if config.image_token_id is not None else config.decoder.vocab_size - 1
    form = template_of({"template": template, "model_type": "internvl_chat", "ps_version": "v2"})
    marks = dict.fromkeys(re.findall(r"<\|[^|<>]+\|>", "".join(map(str, form.to_json().values()))))
    free = (i for i in range(config.decoder.vocab_size - 1, -1, -1) if i != image)
    return {CONTEXT: image, **{text: next(free) for text in (START, END, *marks)}}


def tensor_blocks(key: str, shape: Shape, depth: int, seed: int) -> Iterator[torch.Tensor]:
    """Tensor ``key`` in bf16, flat, a block of rows at a time."""
    generator = _generator(seed, key)
    if key == "logit_scale":
        yield torch.tensor([math.log(100)], dtype=torch.bfloat16)  # where CLIP's training ends
        return
    last = shape[-1]
    if key.endswith(_EMBEDDINGS):
        rows, columns = math.prod(shape[:-1]), 0.02 * _peaks(last, seed, 12)
        scale = torch.ones(rows)
    elif len(shape) > 1:  # a matrix product or the patch convolution: [out, in ...]
        fan_in = shape[0] if key == "text_projection" else math.prod(shape[1:])
        rows, last = shape[0], math.prod(shape[1:])
        if len(shape) == 3:  # stacked experts, each [in, out]
            rows, fan_in, last = shape[0] * shape[1], shape[1], shape[2]
        # Lognormal factors of rows and columns make the tails heavy, as in trained weights.
        scale = torch.empty(rows).normal_(generator=generator).mul_(0.3).exp_() / math.sqrt(fan_in)
        columns = torch.empty(last).normal_(generator=generator).mul_(0.4).exp_()
        if key.endswith("patch_embedding.weight"):
            scale *= _peaks(rows, seed, 12) / 10
        elif key.endswith(_RESIDUAL):
            scale *= _peaks(rows, seed, 12)
            if key.endswith(_OF_DECODERS):  # InternViT has its layer scales
                scale /= math.sqrt(2 * depth)
    else:
        yield _vector(key, shape[0], seed, generator).bfloat16()
        return
    step = max(1, BLOCK_VALUES // last)
    for start in range(0, rows, step):
        some = scale[start : start + step, None]
        values = torch.empty(some.shape[0], last).normal_(generator=generator)
        yield values.mul_(some).mul_(columns).bfloat16().reshape(-1)


def _vector(key: str, size: int, seed: int, generator: torch.Generator) -> torch.Tensor:
    values = torch.empty(size).normal_(generator=generator)
    if key.endswith("bias"):
        return values * 0.02
    if key.endswith((".ls1", ".ls2", ".lambda_1", ".lambda_2")):  # InternViT starts its layer scales at 0.1
        return (values * 0.3).exp() * 0.1
    # Norm weights: training makes them small where a channel is massive.
    return (values * 0.1).exp() / _peaks(size, seed, 4)


def _peaks(width: int, seed: int, height: float) -> torch.Tensor:
    """Ones, and ``height`` at the massive channels of a residual stream of that width."""
    chosen = torch.randperm(width, generator=_generator(seed, f"massive channels of {width}"))[:MASSIVE]
    peaks = torch.ones(width)
    peaks[chosen] = height
    return peaks


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _shards(shapes: dict[str, Shape], limit: int) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, shape in shapes.items():
        if keys and size + _nbytes(shape) > limit:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += _nbytes(shape)
    yield keys


def _header(shapes: dict[str, Shape]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + _nbytes(shape)
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _nbytes(shape: Shape) -> int:
    return math.prod(shape) * ITEM_BYTES


def _json(path: Path, data: Any) -> None:
    write_text(json.dumps(data, indent=2) + "\n", path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a seeded full-size checkpoint.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="internvl-14b", help="which published model")
    parser.add_argument("--config", type=Path, help="a config.json; else the layout's published sizes")
    parser.add_argument("--blocks", type=int, help="blocks of both towers; else all of them")
    parser.add_argument("--vision-blocks", type=int, help="blocks of InternViT that are run")
    parser.add_argument("--qllama-blocks", type=int, help="blocks of QLLaMA or of the chat decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--holes", action="store_true", help="no values: sparse files that take no disk")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest shard, in GB")
    args = parser.parse_args(argv)
    config = load_config(args.config) if args.config else LAYOUTS[args.layout]
    family = family_of(config)
    full = family.depths(config)
    vision: int = args.vision_blocks or args.blocks or full[0]
    text: int = (args.qllama_blocks or args.blocks or full[1]) if full[1] else 0

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        paths = make_checkpoint(
            args.out,
            family.sliced(config, vision, text),
            max(full),
            args.seed,
            int(args.shard_gb * 1e9),
            args.holes,
            lambda count, total: bar.update(task, completed=count, total=total),
        )
    size = sum(path.stat().st_size for path in paths)
    print(f"{args.out}: {vision} + {text} blocks, {len(paths)} shards, {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
