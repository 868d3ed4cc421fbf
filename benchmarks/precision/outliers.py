"""Massive channels: a block of InternViT-6B's width whose activations have outliers, in every 8-bit scheme.

The block's weights are drawn. In a few channels its two norms are made larger, and the columns of the weights
after them smaller by the same power of two: the block's output is unchanged, bit for bit in fp32, while the
inputs of qkv and fc1 have channels many times larger than the rest, as those of trained transformers do
(SmoothQuant, arXiv 2211.10438, section 3). A range that covers them leaves INT8 few steps for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint
from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.folding import fold
from ivl_export.calibration.observers import observers
from ivl_export.calibration.simulate import rounding_hook
from ivl_export.calibration.smoothquant import factors
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.models.config import InternVLConfig
from ivl_export.models.registry import sliced
from ivl_export.models.vit import Block, PatchEmbeddings
from ivl_export.quantization.quantize import dequantise, quantise
from ivl_export.quantization.schemes import SCHEMES

PREFIX = "vision_model.encoder.layers.0."
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
GAIN = 64
"""How many times larger the chosen channels are made; a power of two."""
CHANNELS = 6
METHODS = (
    ("int8", "max", False),
    ("int8", "percentile", False),
    ("int8", "entropy", False),
    ("int8", "mse", False),
    ("int8", "max", True),
    ("fp8", "max", False),
)
"""Scheme, algorithm, and whether SmoothQuant's factors are folded first."""


@dataclass(frozen=True)
class Row:
    """Loss of the block's update in one method, on images outside the calibration set."""

    scheme: str
    algorithm: str
    smooth: bool
    outliers: bool
    sqnr_db: float
    cosine: float


def measure(folder: Path, width: int = 3200, samples: int = 3) -> dict[str, Any]:
    """All methods, with and without outliers.

    Args:
        folder: the checkpoint is written there; the caller removes it.
        width: of the block.
        samples: images to calibrate on, and as many to compare on.
    """
    config = sliced(InternVLConfig(), 1, 1)
    vision = replace(
        config.vision, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 128
    )
    small = replace(
        config.qllama, hidden_size=128, num_attention_heads=1, intermediate_size=128, vocab_size=600
    )
    config = replace(config, vision=vision, qllama=small, clip_embed_dim=64)
    make_checkpoint(folder, config)
    plain = open_checkpoint(folder)
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:CHANNELS]
    divisor = torch.ones(width)
    divisor[chosen] = 1 / GAIN
    louder = dict.fromkeys((f"{PREFIX}norm1", f"{PREFIX}norm2"), divisor)
    embeds = _embeddings(plain, samples)
    rows, ratios = [], {}
    for outliers, divisors in ((False, dict.fromkeys(louder, torch.ones(width))), (True, louder)):
        checkpoint = fold(plain, divisors)
        peaks = _peaks(checkpoint, embeds[:samples])
        ratios["with" if outliers else "without"] = {n: float(p.max() / p.median()) for n, p in peaks.items()}
        want = _updates(checkpoint, embeds[samples:])
        for scheme, algorithm, smooth in METHODS:
            checkpoint_used = checkpoint
            if smooth:
                layers = [f"{PREFIX}attn.qkv", f"{PREFIX}mlp.fc1"]
                smoothing = factors(checkpoint, {n: peaks[n] for n in layers}, layers)
                checkpoint_used = fold(plain, {norm: divisors[norm] * smoothing[norm] for norm in smoothing})
            got = _quantised(checkpoint_used, scheme, algorithm, embeds, samples)
            m = compare(want.numpy(), got.numpy())
            rows.append(Row(scheme, algorithm, smooth, outliers, m.sqnr_db, m.cosine))
    return {
        "width": width,
        "channels": CHANNELS,
        "gain": GAIN,
        "samples": samples,
        "largest_over_median": ratios,
        "rows": [asdict(row) for row in rows],
    }


def _embeddings(checkpoint: Checkpoint, samples: int) -> torch.Tensor:
    """Hidden states before the block [2 x samples, N, D], of drawn scenes."""
    config = checkpoint.config.vision
    embed = PatchEmbeddings(config)
    prefix = "vision_model.embeddings."
    embed.load_state_dict({k: checkpoint.load(prefix + k, torch.float32) for k in embed.state_dict()})
    pixels = next(scenes_calibration(2 * samples).pixels(ImageSettings(config.image_size), 2 * samples))
    with torch.no_grad():
        out: torch.Tensor = embed(torch.from_numpy(pixels))
    return out


def _block(checkpoint: Checkpoint) -> Block:
    with torch.device("meta"):
        block = Block(checkpoint.config.vision)
    state = {k: checkpoint.load(PREFIX + k, torch.float32) for k in block.state_dict()}
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False)


@torch.no_grad()
def _updates(checkpoint: Checkpoint, x: torch.Tensor) -> torch.Tensor:
    block = _block(checkpoint)
    return torch.cat([block(row[None]) - row for row in x])


@torch.no_grad()
def _peaks(checkpoint: Checkpoint, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Largest magnitude of every input channel of each layer."""
    peaks: dict[str, torch.Tensor] = {}
    for name, seen in _inputs(checkpoint, x):
        peak = seen.abs().flatten(0, -2).amax(0)
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
    return peaks


def _inputs(checkpoint: Checkpoint, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The input of every layer, image by image."""
    block, seen = _block(checkpoint), list[tuple[str, torch.Tensor]]()
    for name in LAYERS:
        hook = _Seen(PREFIX + name, seen)
        block.get_submodule(name).register_forward_pre_hook(hook)
    for row in x:
        block(row[None])
        yield from seen
        seen.clear()


class _Seen:
    def __init__(self, name: str, seen: list[tuple[str, torch.Tensor]]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, _: object, args: tuple[torch.Tensor, ...]) -> None:
        self.seen.append((self.name, args[0]))


@torch.no_grad()
def _quantised(
    checkpoint: Checkpoint, scheme: str, algorithm: str, embeds: torch.Tensor, samples: int
) -> torch.Tensor:
    """The block's update with all of its layers quantised."""
    kind = SCHEMES[scheme].activation
    make = observers(algorithm, {PREFIX + name: kind for name in LAYERS})
    watching = {PREFIX + name: make(PREFIX + name) for name in LAYERS}
    for name, seen in _inputs(checkpoint, embeds[:samples]):
        watching[name].collect(seen, float(seen.abs().max()))
    block = _block(checkpoint)
    with _rounded(block, scheme, {name: watching[PREFIX + name].amax() for name in LAYERS}):
        return torch.cat([block(row[None]) - row for row in embeds[samples:]])


@contextmanager
def _rounded(block: Block, scheme: str, amax: dict[str, float]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, top in amax.items():
            linear = block.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            values = dequantise(*quantise(linear.weight, scheme))
            linear.weight = torch.nn.Parameter(values, requires_grad=False)
            hook = rounding_hook(top, SCHEMES[scheme].activation, "bf16")
            stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield
