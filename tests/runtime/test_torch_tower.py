"""The vision tower as a torch module, on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ivl_export.errors import InputError, UsageError
from ivl_export.runtime.torch_tower import VisionTower

pytestmark = pytest.mark.numeric

TINY = Path(__file__).parents[1] / "goldens" / "tiny"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(TINY / "contrastive.safetensors")


@pytest.mark.parametrize(
    ("backend", "options"), [("onnxruntime", {"threads": 1}), ("torch", {}), ("torch", {"dtype": "bf16"})]
)
def test_the_tower_gives_the_published_tokens(
    tiny_bundle: Path, golden: dict[str, torch.Tensor], backend: str, options: dict[str, Any]
) -> None:
    tower = VisionTower.load(tiny_bundle, backend, **options)
    got = tower(golden["pixel_values"])
    want = golden["get_image_features_backbone"]
    assert got.shape == (len(want), tower.num_tokens, tower.hidden_size) == want.shape
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < (0.1 if options.get("dtype") == "bf16" else 2e-5)
    assert tower(golden["pixel_values"].bfloat16()).dtype == torch.bfloat16
    tower.close()


def test_it_fits_into_another_model(tiny_bundle: Path, golden: dict[str, torch.Tensor]) -> None:
    tower = VisionTower.load(tiny_bundle, select="patches")
    head = torch.nn.Linear(tower.hidden_size, 8)
    model = torch.nn.Sequential(tower, head).to(torch.float32)
    assert set(model.state_dict()) == {"1.weight", "1.bias"}
    pixels = golden["pixel_values"]
    assert pixels.shape[-1] == tower.image_size
    model(pixels).sum().backward()  # gradients reach the head, not the tower
    assert head.weight.grad is not None
    torch.testing.assert_close(tower(pixels), golden["get_image_features_backbone"][:, 1:], atol=2e-5, rtol=0)
    many = pixels[:1].repeat(tower.components.spec("vision").axis("batch").max + 1, 1, 1, 1)
    assert len(tower(many)) == len(many)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_any_block_that_the_bundle_gives(tiny_bundle: Path, backend: str) -> None:
    golden = load_file(TINY / "vision.safetensors")
    for block, stored in ((1, 1), (-2, 2), (3, 3)):
        tower = VisionTower.load(tiny_bundle, backend, select="patches", block=block)
        want = golden["hidden_states"][stored][:, 1:]
        torch.testing.assert_close(tower(golden["pixel_values"]), want, atol=2e-5, rtol=0)
        tower.close()


def test_what_it_refuses(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="no block 4"):
        VisionTower.load(tiny_bundle, block=4)
    with pytest.raises(UsageError, match="select"):
        VisionTower.load(tiny_bundle, select="pooled")
    tower = VisionTower.load(tiny_bundle)
    with pytest.raises(InputError):
        tower(torch.zeros(1, 3, 8, 8))


def test_the_five_lines_of_the_documentation(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text(encoding="utf-8")
    lines = text.split("```python\n")[1].split("```")[0]
    assert len(lines.split("\n\n", 1)[1].splitlines()) + 1 <= 5
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "internvl-nano-fp8").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch}
    exec(compile(lines, "embedding.md", "exec"), names)
    assert names["features"].shape == (4, names["tower"].num_tokens, names["tower"].hidden_size)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_bytes_are_refused(tiny_bundle: Path, dtype: torch.dtype) -> None:
    tower = VisionTower.load(tiny_bundle, "onnxruntime")
    pixels = torch.zeros(1, 3, tower.image_size, tower.image_size, dtype=dtype)
    with pytest.raises(InputError, match=r"normalised floats.*preprocess"):
        tower(pixels)
    with pytest.raises(InputError, match=r"torch tensor.*ndarray.*preprocess"):
        tower(pixels.numpy())
    tower.close()
