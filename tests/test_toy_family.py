"""A model form that is defined in this one file goes the whole way from checkpoint to estimate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ivl_export
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.cli import main
from ivl_export.inputs.preprocess import ImageSettings, preprocess_images
from ivl_export.models import registry
from ivl_export.models.calls import Call, SampleBatch
from ivl_export.models.layers import RMSNorm
from ivl_export.models.registry import Component, Context, Family, Macs, Ranges, Shape

pytestmark = pytest.mark.numeric

pytest.importorskip("onnxscript")

WIDTH, HIDDEN, SIDE, PATCH, CORNERS = 32, 64, 28, 7, 4


@dataclass(frozen=True)
class ToyConfig:
    """Patches that are moved by the camera's place (``corners``), through blocks of a gated product."""

    image_size: int = SIDE
    blocks: int = 2
    unknown_keys: tuple[str, ...] = ()

    def to_published(self) -> dict[str, Any]:
        return {"model_type": "toy", "image_size": self.image_size, "blocks": self.blocks}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(WIDTH, 1e-6)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.corners = nn.Linear(CORNERS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(config.blocks))
        self.head = nn.Linear(WIDTH, 5)

    def embed(self, pixel_values: Tensor, corners: Tensor) -> Tensor:
        """[B, 3, S, S] and [B, 4] -> [B, N, D]."""
        patches: Tensor = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x: Tensor = patches + self.corners(corners)[:, None]
        return x

    def forward(self, pixel_values: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(pixel_values, corners)
        for block in self.blocks:
            x = block(x)
        return x, self.head(x.mean(1))


class ToyComponent(Component[ToyConfig]):
    """One stack without a cache, whose second input no other model has."""

    name = "toy"
    tower = "toy"
    entry = ("patches.", "corners.")

    def spec(self, config: ToyConfig, ranges: Ranges) -> ComponentSpec:
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, config.image_size, config.image_size))
        corners = TensorSpec("corners", "float", ("batch", CORNERS))
        rows = (config.image_size // PATCH) ** 2
        outputs = (
            TensorSpec("rows", "float", ("batch", rows, WIDTH)),
            TensorSpec("scores", "float", ("batch", 5)),
        )
        return ComponentSpec(self.name, (pixels, corners), outputs, (Axis("batch", *ranges.batch),))

    def module(self, config: ToyConfig) -> nn.Module:
        return Toy(config)

    def shapes(self, config: ToyConfig) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {
            "patches.weight": (WIDTH, 3, PATCH, PATCH), "patches.bias": (WIDTH,),
            "corners.weight": (WIDTH, CORNERS), "corners.bias": (WIDTH,),
            "head.weight": (5, WIDTH), "head.bias": (5,),
        }  # fmt: skip
        for i in range(config.blocks):
            block = f"blocks.{i}."
            shapes |= {f"{block}norm.weight": (WIDTH,), f"{block}up.weight": (HIDDEN, WIDTH)}
            shapes |= {f"{block}up.bias": (HIDDEN,), f"{block}down.weight": (WIDTH, HIDDEN)}
            shapes[f"{block}down.bias"] = (WIDTH,)
        return shapes

    def place(self, config: ToyConfig) -> str:
        return "blocks"

    def depth(self, config: ToyConfig) -> int:
        return config.blocks

    def period(self, config: ToyConfig) -> tuple[ToyConfig, int]:
        return replace(config, blocks=1), config.blocks

    def enter(self, config: ToyConfig, module: Any, context: Context) -> Tensor:
        x: Tensor = module.embed(context.inputs["pixel_values"], context.inputs["corners"])
        return x

    def run_block(
        self, config: ToyConfig, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, None]:
        return module.blocks[block](x), None

    def leave(self, config: ToyConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        return {"rows": x, "scores": module.head(x.mean(1))}

    def calls(self, config: ToyConfig, batch: SampleBatch) -> Iterator[Call]:
        """Corners that a sample always has, drawn from its digest."""
        for call in super().calls(config, batch):
            yield replace(call, inputs={"corners": np.stack([corners_of(d) for d in batch.digests])})

    def hidden(self, config: ToyConfig) -> tuple[int, int]:
        return (config.image_size // PATCH) ** 2, WIDTH

    def macs(self, config: ToyConfig, sizes: Mapping[str, int]) -> Macs:
        rows = self.hidden(config)[0]
        products = {"patches": rows * 3 * PATCH**2 * WIDTH, "corners": CORNERS * WIDTH, "head": 5 * WIDTH}
        per_block = config.blocks * rows * WIDTH * HIDDEN
        return products | {"blocks.*.up": per_block, "blocks.*.down": per_block}


class ToyFamily(Family[ToyConfig]):
    name = "toy"
    title = "a toy"
    config_type = ToyConfig
    components = (ToyComponent(),)

    def claims(self, data: Mapping[str, Any]) -> bool:
        return data.get("model_type") == "toy"

    def read_config(self, data: dict[str, Any], source: str, folder: Path | None = None) -> ToyConfig:
        return ToyConfig(data["image_size"], data["blocks"])

    def model(self, config: ToyConfig) -> nn.Module:
        return Toy(config)


def corners_of(digest: str) -> Any:
    return np.random.default_rng(int(digest[:16], 16)).standard_normal(CORNERS).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    save_file(
        {k: v.contiguous() for k, v in Toy(ToyConfig()).state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(ToyConfig().to_published()))
    ImageSettings(SIDE).save(folder / "preprocessor_config.json")
    before = dict(registry._families)
    registry.register(ToyFamily())
    yield folder
    registry._families.clear()
    registry._families.update(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize(
    ("precision", "least"), [pytest.param("fp8", 0.99, marks=pytest.mark.slow), ("int8", 0.999)]
)
def test_a_new_family_goes_the_whole_way(
    checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    precision: str,
    least: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = ivl_export.build(
        checkpoint, tmp_path / "bundle", precision=precision, calib=photos, calib_samples=40,
        backend="onnxruntime",
    )  # fmt: skip
    assert list(bundle.manifest.components) == ["toy"]
    ranges = json.loads((bundle.root / "ranges.json").read_text())["amax"]["toy"]
    assert {"blocks.0.up", "blocks.1.down"} <= set(ranges)
    accuracy = json.loads((bundle.root / "receipts" / "accuracy.json").read_text())
    assert "toy" in json.dumps(accuracy)

    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(3)]
    corners = rng.standard_normal((3, CORNERS)).astype(np.float32)
    with ivl_export.load(bundle, threads=1) as model:
        pixels = model.pixel_values(images)
        np.testing.assert_array_equal(pixels, preprocess_images(images, ImageSettings(SIDE)))
        scores = model.components.run("toy", {"pixel_values": pixels, "corners": corners})["scores"]
    reference = Toy(ToyConfig())
    reference.load_state_dict({k: ivl_export_tensor(checkpoint, k) for k in reference.state_dict()})
    with torch.no_grad():
        want = reference(torch.from_numpy(pixels), torch.from_numpy(corners))[1].numpy()
    cosines = (scores * want).sum(1) / np.linalg.norm(scores, axis=1) / np.linalg.norm(want, axis=1)
    assert least < cosines.min() < 1 - 1e-9, "quantised, and near"

    assert main(["profile", str(bundle.root), "--batch", "1", "--seconds", "0.05", "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert [case["name"] for case in profile["cases"] if case["kind"] == "component"] == ["toy"]
    assert main(["estimate", "--gpu", "l40s", "--model", str(bundle.root), "--batch", "8", "--json"]) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert (point["batch"], point["components"][0]["component"]) == (8, "toy")
    assert point["ms"] > 0


def ivl_export_tensor(folder: Path, key: str) -> Tensor:
    from ivl_export.models.checkpoint import open_checkpoint

    return open_checkpoint(folder).load(key)
