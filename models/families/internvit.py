"""An InternViT published alone (the layout of InternViT-6B-224px)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...bundle.spec import Axis, ComponentSpec, TensorSpec, feature_name
from .. import macs
from ..config import InternViTConfig, VisionConfig
from ..layout import VISION, vit_shapes
from ..registry import AttentionSize, Component, Context, Family, Macs, Ranges, Shape, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..storage import TensorRef


class Vision(Component[Any]):
    """All of InternViT, for any config with a ``vision``; its keys are those it has within an InternVL."""

    name = "vision"
    tower = "vision"
    entry: ClassVar[tuple[str, ...]] = (f"{VISION}embeddings.",)

    def spec(self, config: Any, ranges: Ranges) -> ComponentSpec:
        v: VisionConfig = config.vision
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, config.image_size, config.image_size))
        tokens = TensorSpec("tokens", "float", ("batch", v.num_tokens, v.hidden_size))
        taps = [TensorSpec(feature_name(k), "float", tokens.shape) for k in self.taps(config)]
        outputs = (tokens, *self.heads(config), *taps)
        return ComponentSpec(self.name, (pixels,), outputs, (Axis("batch", *ranges.batch),))

    def heads(self, config: Any) -> tuple[TensorSpec, ...]:
        """Outputs of heads over the tokens."""
        return ()

    def module(self, config: Any) -> nn.Module:
        from ..component_modules import VisionTokens

        return VisionTokens(config)

    def shapes(self, config: Any) -> dict[str, Shape]:
        return vit_shapes(config.vision, VISION)

    def place(self, config: Any) -> str:
        return f"{VISION}encoder.layers"

    def depth(self, config: Any) -> int:
        return int(config.vision.num_hidden_layers)

    def period(self, config: Any) -> tuple[Any, int]:
        one = replace(config.vision, num_hidden_layers=1, feature_blocks=())
        return replace(config, vision=one), self.depth(config)

    def taps(self, config: Any) -> tuple[int, ...]:
        blocks: tuple[int, ...] = config.vision.feature_blocks
        return blocks

    def vit(self, module: Any) -> Any:
        """The :class:`..vit.InternViT` in the component's module."""
        return module.vision_model

    def enter(self, config: Any, module: Any, context: Context) -> Tensor:
        x: Tensor = self.vit(module).embeddings(context.inputs["pixel_values"])
        return x

    def run_block(
        self, config: Any, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, None]:
        return self.vit(module).encoder.layers[block](x), None

    def after_block(self, config: Any, module: Any, number: int, x: Tensor) -> dict[str, Tensor]:
        return {feature_name(number): x} if number in self.taps(config) else {}

    def leave(self, config: Any, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        return {"tokens": x}

    def tokens(self, config: Any) -> int:
        """Tokens of an image: patches and the class token."""
        return int(config.vision.num_tokens)

    def hidden(self, config: Any) -> tuple[int, int]:
        return self.tokens(config), config.vision.hidden_size

    def attentions(self, config: Any) -> dict[str, AttentionSize]:
        size = AttentionSize(config.vision.head_dim, self.tokens(config))
        return {f"{self.place(config)}.{i}.attn": size for i in range(self.depth(config))}

    def macs(self, config: Any, sizes: Mapping[str, int]) -> Macs:
        tower = self.place(config).removesuffix("encoder.layers")
        return macs.vit(config.vision, self.depth(config), self.tokens(config), tower)

    def attention_values(self, config: Any, layer: str, sizes: Mapping[str, int]) -> int:
        return 4 * self.tokens(config) * int(config.vision.hidden_size)


class InternViT(Family[InternViTConfig]):
    """The vision tower alone: features, no texts."""

    name = "internvit"
    title = "an InternViT alone"
    config_type = InternViTConfig
    components = (Vision(),)
    runtime = "model:InternVL"

    def claims(self, data: Mapping[str, Any]) -> bool:
        return str(data.get("model_type", "")).startswith("intern_vit")

    def read_config(self, data: dict[str, Any], source: str, folder: Path | None = None) -> InternViTConfig:
        return InternViTConfig.from_published(data, source)

    def locate(
        self, config: InternViTConfig, tensors: dict[str, TensorRef], folder: Path, readers: dict[Path, Any]
    ) -> dict[str, TensorRef]:
        return {VISION + name: ref for name, ref in tensors.items()}

    def stored(self, config: InternViTConfig) -> dict[str, tuple[str, Shape]]:
        return {key.removeprefix(VISION): (key, shape) for key, shape in self.shapes(config).items()}

    def depths(self, config: InternViTConfig) -> tuple[int, int]:
        return config.vision.num_hidden_layers, 0

    def sliced(self, config: InternViTConfig, vision: int, text: int) -> InternViTConfig:
        return replace(config, vision=replace(config.vision, num_hidden_layers=vision))

    def model(self, config: InternViTConfig) -> nn.Module:
        from ..internvl import InternViTModel

        return InternViTModel(config)

    def resized(self, config: InternViTConfig, image_size: int) -> InternViTConfig:
        return replace(config, vision=replace(config.vision, image_size=image_size))

    def patch_size(self, config: InternViTConfig) -> int:
        return config.vision.patch_size

    def with_features(self, config: InternViTConfig, blocks: tuple[int, ...]) -> InternViTConfig:
        return replace(config, vision=replace(config.vision, feature_blocks=blocks))

    def feature_depth(self, config: InternViTConfig) -> int:
        return config.vision.num_hidden_layers

    def identity(self, config: InternViTConfig) -> dict[str, Any]:
        return self.with_features(config, ()).to_published()


register(InternViT())
