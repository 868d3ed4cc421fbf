"""The models that the runtime is measured with, built into bundles in a work folder.

``nano`` and ``nano-chat`` are the shipped ones. ``mid`` and ``mid-chat`` are seeded checkpoints in published
layouts with a tower of ViT-B's sizes and a LLaMA of 170 million parameters: large enough that the products
dominate, small enough for two cores. Builds run every time; finished ones do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint
from ivl_export.models.config import ChatConfig, InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.models.registry import ModelConfig
from ivl_export.models.shipped import NANO_CHAT, nano_chat_folder, nano_folder
from ivl_export.models.tiles_published import PUBLISHED
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.run import build
from ivl_export.progress import Silent

TOWER = VisionConfig(768, 12, 12, 3072, image_size=224, patch_size=14)
LLAMA = QLlamaConfig(1024, 8, 16, 2816, vocab_size=32000)
_TINY_TOWER = VisionConfig(64, 2, 2, 128, image_size=56, patch_size=14)
_TINY_LLAMA = QLlamaConfig(64, 2, 2, 128, vocab_size=1600)
_1B = PUBLISHED["internvl3-1b"]
CONFIGS: dict[str, ModelConfig] = {
    "mid": InternVLConfig(TOWER, LLAMA),
    "mid-chat": ChatConfig(TOWER, LLAMA, image_size=224, select_layer=-1),
    # For tests of the benchmarks themselves.
    "tiny": InternVLConfig(_TINY_TOWER, _TINY_LLAMA, clip_embed_dim=32, num_query_token=8),
    "tiny-chat": ChatConfig(_TINY_TOWER, _TINY_LLAMA, image_size=56, select_layer=-1),
    "tiny-tiles": replace(
        _1B,
        vision=replace(_1B.vision, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=128, image_size=56),
        decoder=replace(_1B.decoder, vocab_size=1600, hidden_size=64, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=128,
                        bos_token_id=1, eos_token_ids=(2,)),
        image_size=56,
        image_token_id=1590,
    ),
    "internvl3-1b": _1B,
}  # fmt: skip
TILES = ("internvl3-1b", "tiny-tiles")
"""Of InternVL 1.1 to 3.5."""
SHIPPED = {"nano": None, "nano-chat": NANO_CHAT}
PRECISIONS = {"fp32": "bf16", "int8": "int8", "fp8": "fp8", "plain": "fp32"}
"""How products run on the CPU, and the recipe: bf16 weights are cast to fp32 when they are loaded; ``plain``
weights are stored in fp32.
"""


@dataclass(frozen=True)
class Setting:
    """How a part is measured.

    Args:
        work: where checkpoints and bundles are kept.
        threads: of every candidate's products.
        rounds: samples of each candidate.
        models: of :data:`CONFIGS` and :data:`SHIPPED` without ``-chat``.
        new_tokens: that are decoded.
    """

    work: Path
    threads: int = 2
    rounds: int = 7
    models: tuple[str, ...] = ("nano", "mid")
    new_tokens: int = 17

    def bundle(self, model: str, precision: str) -> Path:
        """The bundle of ``model`` in ``precision`` (of :data:`PRECISIONS`), built if it is not there."""
        config = BuildConfig(
            self.work / f"{model}-{precision}",
            model=SHIPPED[model] if model in SHIPPED else self.checkpoint(model),
            precision=PRECISIONS[precision],
            backend=(ORT,),
            allow_accuracy_loss=True,
        )
        return build(plan_build(config), Silent()).bundle.root

    def checkpoint(self, model: str) -> Path:
        """The checkpoint of ``model``; one of :data:`CONFIGS` is made if it is not there."""
        if model in SHIPPED:
            return nano_folder() if model == "nano" else nano_chat_folder()
        folder = self.work / model
        if not (folder / "config.json").is_file():
            part = folder.with_name(f".{model}.part")
            make_checkpoint(part, CONFIGS[model], depth=LLAMA.num_hidden_layers)
            part.replace(folder)
        return folder
