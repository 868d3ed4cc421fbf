"""Tiles, ids and prompts against the installed transformers (extra ``dev``)."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl_export.inputs.chat_template import NATIVE, Turn, from_jinja, prompt_text
from ivl_export.inputs.preprocess import ImageSettings, read_images
from ivl_export.inputs.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.numeric,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]
TOKENIZERS = Path(__file__).parents[1] / "goldens" / "family" / "tokenizers"
TEXTS = [
    "naïve café é — emoji 👍🏽 <box>[[1,2]]</box> <img >",
    "  two  spaces\r\n\r\n1234 it's",
    "一只猫\n\n\t",
    "e\u0301",
]


def test_tiles_equal_those_of_transformers_at_random_sizes(tmp_path: Path) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    rng = np.random.default_rng(5)
    for most, least in ((12, 1), (6, 1), (7, 2), (40, 1)):
        theirs = GotOcr2ImageProcessorPil(
            size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=most, min_patches=least
        )
        theirs.save_pretrained(tmp_path)
        settings = ImageSettings.load(tmp_path / "preprocessor_config.json")
        assert (settings.unknown, settings.size) == ((), 28)
        for _ in range(12):
            height, width = (int(n) for n in rng.integers(1, 160, 2))
            image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
            want = theirs(image, return_tensors="np")
            own = read_images([image], settings)
            assert own.tiles == tuple(want["num_patches"])
            np.testing.assert_allclose(own.values, want["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json")])
def test_ids_equal_those_of_transformers(files: tuple[str, ...], tmp_path: Path) -> None:
    import transformers

    for name in (*files, "tokenizer_config.json"):
        shutil.copy(TOKENIZERS / "qwen2_mini" / name, tmp_path)
    own, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert own.encode_parts(own.markup(text)) == ids
        assert own.decode(ids, until_eos=False) == theirs.decode(ids, skip_special_tokens=True)


def test_prompts_equal_those_of_transformers(tmp_path: Path) -> None:
    import transformers

    source = (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZERS / "qwen2_mini" / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": source}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def said(role: str, *parts: dict[str, str]) -> dict[str, object]:
        return {"role": role, "content": list(parts)}

    messages = [
        said("user", {"type": "image"}, {"type": "text", "text": "What is it? "}),
        said("assistant", {"type": "text", "text": "a ring"}),
        said("user", {"type": "text", "text": "And its\ncolor?"}),
    ]
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = [Turn("What is it? ", "a ring", 1), Turn("And its\ncolor?")]
    for template in (NATIVE, from_jinja(source)):
        assert prompt_text(template, turns) == want
