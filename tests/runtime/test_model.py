"""``runtime.InternVL`` on a real bundle equals the published numbers and the PyTorch model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_export.errors import CapabilityError, InputError, IvlError, UsageError
from ivl_export.inputs.preprocess import preprocess_images
from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2
from ivl_export.tests.numbers import FEATURES, HIDDEN, near

pytestmark = pytest.mark.numeric

TINY = Path(__file__).parents[1] / "goldens" / "tiny"
TEXTS = ["a small red circle", "two large blue stars", "a ring", "一个红色的小圆形"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def torch_model() -> Any:
    torch = pytest.importorskip("torch")
    from ivl_export.models import load_model

    return load_model(TINY, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(TINY / "contrastive.safetensors")


@pytest.fixture(scope="module")
def generated() -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.numpy import load_file

    facts = json.loads((TINY / "generate.json").read_text())
    return load_file(TINY / "generate.safetensors"), facts


def pictures(count: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (70, 50 + i, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("mode", ["C", "G"])
def test_image_embeddings_equal_the_goldens(model: InternVL, golden: dict[str, Any], mode: str) -> None:
    name: Any = f"InternVL-{mode}"
    out = model.encode_image(golden["pixel_values"], name)
    assert out.dtype == np.float32
    near(out, golden[f"{mode}_image_embeds"], FEATURES)


def test_dense_features_equal_the_goldens(model: InternVL, golden: dict[str, Any]) -> None:
    out = model.dense(golden["pixel_values"])
    near(out, golden["get_image_features_backbone"], HIDDEN)


def test_every_block_that_was_kept_equals_the_goldens(model: InternVL) -> None:
    from safetensors.numpy import load_file

    golden = load_file(TINY / "vision.safetensors")
    result = model.features(golden["pixel_values"], [2, -3, 3])
    assert list(result) == [2, 1, 3]
    for block, states in result.items():
        assert states.dtype == np.float32
        near(states, golden["hidden_states"][block], HIDDEN)
    np.testing.assert_array_equal(model.dense(golden["pixel_values"], block=2), result[2])
    assert model.features([], [1])[1].shape == (0, 17, 60)
    for block in (0, 4, -4):
        with pytest.raises(UsageError, match=f"no block {block}"):
            model.dense(golden["pixel_values"], block=block)


def test_text_embeddings_equal_torch(model: InternVL, torch_model: Any) -> None:
    import torch

    long = " ".join(TEXTS * 20)
    texts = [*TEXTS, long, "", *TEXTS[:1]]
    out = model.encode_text(texts)
    for text, row in zip(texts, out, strict=True):
        ids, _ = model.tokenizer.encode_contrastive([text])  # padded on its own, not with the others
        with torch.no_grad():
            want = torch_model.encode_text(torch.from_numpy(ids))[0].numpy()
        near(row, want, FEATURES)
    # four of these texts fit 16 or 32 tokens: no 80-token batch was needed for them
    assert np.array_equal(out[0], out[-1])


@pytest.mark.parametrize("mode", ["C", "G"])
def test_classification_is_the_ensemble_of_templates(model: InternVL, torch_model: Any, mode: str) -> None:
    import torch

    name: Any = f"InternVL-{mode}"
    images, templates = pictures(3), ["a {}", "two {}s"]
    labels = ["red circle", "blue star", "ring"]
    out = model.classify(images, labels, templates, name, resize="square")
    with torch.no_grad():
        classes = []
        for label in labels:
            ids, _ = model.tokenizer.encode_contrastive([t.replace("{}", label) for t in templates])
            unit = torch.nn.functional.normalize(torch_model.encode_text(torch.from_numpy(ids)), dim=-1)
            classes.append(torch.nn.functional.normalize(unit.mean(0), dim=-1))
        pixels = torch.from_numpy(preprocess_images(images, model.image_settings))
        image = torch.nn.functional.normalize(torch_model.encode_image(pixels, name), dim=-1)
        want = (torch_model.logit_scale.exp() * image @ torch.stack(classes).T).softmax(-1).numpy()
    np.testing.assert_allclose(out, want, atol=1e-4)
    once = model.class_embeddings(labels, templates)
    assert np.array_equal(model.classify(images, once, mode=name, resize="square"), out)


def test_retrieval_ranks_by_cosine(model: InternVL) -> None:
    images = pictures(7)
    ranking = model.retrieve(TEXTS, images, top=3)
    cosine = l2(model.encode_text(TEXTS)) @ l2(model.encode_image(images, resize="square")).T
    assert ranking.indices.tolist() == np.argsort(-cosine, axis=1)[:, :3].tolist()
    np.testing.assert_allclose(ranking.scores, -np.sort(-cosine, axis=1)[:, :3], atol=1e-6)


@pytest.mark.parametrize("which", ["nopad", "leftpad", "rightpad"])
def test_greedy_tokens_equal_the_goldens(model: InternVL, generated: Any, which: str) -> None:
    tensors, facts = generated
    ids, mask = tensors[f"{which}_input_ids"], tensors[f"{which}_attention_mask"]
    out = model.generate(tensors["pixel_values"], ids, mask, max_new_tokens=10)
    assert out.tolist() == facts[which]["new_tokens"]


def test_beam_tokens_equal_the_goldens(model: InternVL, generated: Any) -> None:
    tensors, facts = generated
    pixels, ids = tensors["pixel_values"], tensors["nopad_input_ids"]
    out = model.generate(pixels, ids, None, max_new_tokens=30, num_beams=5, min_new_tokens=8)
    assert out.tolist() == facts["beam5_min8_max30_batch3_new_tokens"]
    alone = model.generate(pixels[1:2], ids[1:2], None, max_new_tokens=30, num_beams=5, min_new_tokens=8)
    assert alone[0].tolist() == facts["beam5_min8_max30"][1]["new_tokens"]


def test_captions_equal_torch_and_mixed_prompts_equal_single_ones(model: InternVL, torch_model: Any) -> None:
    import torch

    images, prompts = pictures(2), ["a", "two large"]
    both = model.caption(images, prompts, max_new_tokens=8)
    for image, prompt, text in zip(images, prompts, both, strict=True):
        ids = torch.tensor([model.tokenizer.encode_prompt(prompt)])
        pixels = torch.from_numpy(preprocess_images([image], model.image_settings))
        tokens = torch_model.generate(pixels, ids, torch.ones_like(ids), max_new_tokens=8)
        assert text == model.tokenizer.decode(tokens[0].tolist()).strip()


def test_tensors_go_from_engine_to_engine_and_give_the_same(
    model: InternVL, generated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and outputs of an engine on a GPU: nothing becomes an array between pixels and logits."""
    torch = pytest.importorskip("torch")
    pixels, ids = generated[0]["pixel_values"], generated[0]["nopad_input_ids"]
    want = model.generate(pixels, ids, None, max_new_tokens=12, num_beams=3)
    kinds: set[tuple[str, type]] = set()
    for name in ("vision", "qllama_query", "qllama_step"):
        engine = model.components.open(name)
        original = engine.run_tensors

        def spy(inputs: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            kinds.update((key, type(value)) for key, value in inputs.items() if "." in key or key == "tokens")
            return original(inputs, *args, **kwargs)

        monkeypatch.setattr(engine, "run_tensors", spy)
        monkeypatch.setattr(engine, "run", None)
    got = model.generate(torch.from_numpy(pixels), ids, None, max_new_tokens=12, num_beams=3)
    np.testing.assert_array_equal(got, want)
    assert {kind for _, kind in kinds} == {torch.Tensor}
    assert {"tokens", "past_key.0", "past_value.0"} <= {name for name, _ in kinds}


def test_more_images_than_a_batch_are_split(model: InternVL, tiny_bundle: Path) -> None:
    images = pictures(7)
    whole = model.encode_image(images, "InternVL-G"), model.caption(images, "a", 2, max_new_tokens=5)
    with InternVL.load(tiny_bundle, threads=1, batch=3) as small:
        split = small.encode_image(images, "InternVL-G")
        assert small.timings["vision"].calls == small.timings["preprocess"].calls == 3
        near(split, whole[0], FEATURES)
        assert small.caption(images, "a", 2, max_new_tokens=5) == whole[1]


def test_more_rows_than_the_engine_takes_are_split(model: InternVL) -> None:
    limit = model.components.spec("qllama_text").axis("batch").max
    labels = [f"{a} {b}" for a in "abcdefghijkl" for b in "mnopqrstuvwx"]
    assert limit < len(labels) < 2 * limit
    before = model.timings["qllama_text"].calls
    out = model.encode_text(labels)
    assert model.timings["qllama_text"].calls == before + 2
    near(out[-1], model.encode_text(labels[-1:])[0], FEATURES)


@settings(max_examples=20, deadline=None)
@given(words=st.lists(st.integers(0, 40), min_size=1, max_size=6), more=st.integers(0, 3))
def test_tokens_of_any_lengths_equal_their_texts(model: InternVL, words: list[int], more: int) -> None:
    texts = [" ".join(["a ring"] * n) for n in words]
    ids, lengths = model.tokenizer.encode_contrastive(texts)
    ids = np.pad(ids, ((0, 0), (0, more)), constant_values=7)  # these positions are not read
    result = model.encode_tokens(ids[:, : lengths.max() + more], lengths)
    near(result, model.encode_text(texts), FEATURES)


@pytest.mark.parametrize(
    ("ids", "lengths"), [((2, 8), [3]), ((2, 8), [0, 3]), ((1, 8), [9]), ((1, 90), [81]), ((8,), [3])]
)
def test_what_is_no_text_is_refused(model: InternVL, ids: tuple[int, ...], lengths: list[int]) -> None:
    with pytest.raises(InputError, match="not texts"):
        model.encode_tokens(np.ones(ids, np.int64), np.array(lengths))


def test_nothing_in_nothing_out(model: InternVL) -> None:
    assert model.encode_image([]).shape == (0, 48)
    assert model.encode_text([]).shape == (0, 48)
    assert model.encode_tokens(np.zeros((0, 16), np.int64), np.zeros(0, np.int64)).shape == (0, 48)
    assert model.dense([]).shape == (0, 17, 60)
    assert model.caption([]) == []
    assert model.classify([], ["a", "b"]).shape == (0, 2)


def test_threads_share_a_model(tiny_bundle: Path, golden: dict[str, Any]) -> None:
    with InternVL.load(tiny_bundle, threads=1) as model:
        results: list[Any] = [None] * 4

        def work(slot: int) -> None:
            results[slot] = [model.encode_image(golden["pixel_values"], "InternVL-G") for _ in range(5)]

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            for out in result:
                near(out, golden["G_image_embeds"], FEATURES)
        assert model.timings["open vision"].calls == 1
        assert model.timings["vision"].calls == 20


def test_wrong_calls_say_what_is_wrong(model: InternVL, tiny_bundle: Path, tmp_path: Path) -> None:
    calls: list[tuple[type[IvlError], Any]] = [
        (UsageError, lambda: model.encode_image(pictures(1), "InternVL-X")),  # type: ignore[arg-type]
        (UsageError, lambda: model.classify(pictures(1), [])),
        (UsageError, lambda: model.classify(pictures(1), ["a"], ["no place"])),
        (UsageError, lambda: model.caption(pictures(2), ["one prompt"])),
        (UsageError, lambda: model.caption(pictures(1), num_beams=0)),
        (InputError, lambda: model.caption(pictures(1), max_new_tokens=10_000)),
        (InputError, lambda: model.encode_image([tmp_path / "missing.png"])),
        (InputError, lambda: model.encode_image("one.png")),
        (CapabilityError, lambda: InternVL.load(tiny_bundle, "tensorrt-rtx", ["vision"])),
        (CapabilityError, lambda: InternVL.load(tiny_bundle, components=["decoder"])),
    ]
    for kind, call in calls:
        with pytest.raises(kind) as error:
            call()
        assert error.value.what
        assert error.value.why or error.value.fix


def test_closed_models_say_so(tiny_bundle: Path) -> None:
    model = InternVL.load(tiny_bundle, components=["vision"], threads=1)
    model.close()
    with pytest.raises(InputError, match="closed"):
        model.encode_image(pictures(1))


def test_running_imports_no_torch(tiny_bundle: Path) -> None:
    code = f"""
import sys
import numpy as np
from ivl_export.runtime import InternVL
with InternVL.load({str(tiny_bundle)!r}, threads=1) as model:
    image = [np.zeros((40, 40, 3), np.uint8)]
    model.classify(image, ["a", "b"], mode="InternVL-G")
    model.caption(image, num_beams=2, max_new_tokens=3)
heavy = {{"torch", "transformers", "modelopt", "onnx", "onnx_ir", "onnxscript", "matplotlib"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_texts_of_other_types_are_refused_everywhere(model: InternVL) -> None:
    image = Image.new("RGB", (20, 20))
    for prompt in (b"x", 5, None):
        with pytest.raises(InputError, match=r"text|prompt"):
            model.caption([image], prompt)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"text|prompt"):
            asyncio.run(model.acaption(image, prompt))  # type: ignore[arg-type]
    labels = ["a cat", "a dog"]
    want = model.classify([image], labels)
    assert np.array_equal(model.classify([image], np.array(labels)), want)
