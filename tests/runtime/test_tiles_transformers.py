"""Bundles of InternVL 1.1 to 3.5 at random sizes and settings against the installed transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.runtime import InternVLChat

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from ivl_export.tests.models.test_family_transformers import IMAGE, prompt, saved  # noqa: E402
from ivl_export.tests.runtime.test_tiles import in_short_calls, sealed  # noqa: E402

FORMS = (
    "llama, llama3, biases, an earlier state",
    "qwen2, yarn, windows",
    "phi3, an answer that crosses to the long factors",
    "phi3, a prompt of long factors, a window",
)
"""Caches and positions that a bundle could get wrong and the published models of test_tiles.py do not show.

The others differ in what modules compute, which test_family_transformers.py compares.
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_random_models_answer_as_in_transformers(form: str, tmp_path: Path) -> None:
    """Greedy tokens of bundles; a prompt in several calls, too, and what an earlier conversation left."""
    seed = 17 + sum(map(ord, form))
    saved(tmp_path / "model", form, seed)
    config: Any = open_checkpoint(tmp_path / "model").model
    pixels, ids = prompt(config, seed)
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "model", attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        want = theirs.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=12,
            do_sample=False, suppress_tokens=[IMAGE], eos_token_id=None, pad_token_id=0,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
    with InternVLChat.load(sealed(tmp_path / "model", tmp_path), threads=1) as model:
        model.__dict__["chat_format"] = replace(model.chat_format, eos=())
        assert model.generate(pixels.numpy(), ids.numpy(), max_new_tokens=12).tolist() == want
        assert model.generate(pixels.numpy(), ids.numpy(), max_new_tokens=12).tolist() == want
        in_short_calls(model)
        assert model.generate(pixels.numpy(), ids.numpy(), max_new_tokens=12).tolist() == want
