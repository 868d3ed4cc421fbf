"""Estimates of chat models: at the paper's sizes, from a bundle, and held to the receipt of nano-chat."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivl_export.bundle import Bundle, seal
from ivl_export.cli import main
from ivl_export.models.config import ChatConfig, InternVLConfig
from ivl_export.models.shipped import nano_chat_folder
from ivl_export.models.tiles_published import PUBLISHED
from ivl_export.profiles.cost.chat_estimate import FULL_SIZE, ChatEstimate, cache_bytes, estimate
from ivl_export.profiles.cost.evidence import arithmetic_of
from ivl_export.profiles.cost.gpus import find_gpu
from ivl_export.profiles.cost.roofline import Arithmetic, component_macs
from ivl_export.profiles.cost.sizes import component_shapes, plan_of, weights
from ivl_export.quantization.recipe import load_recipe

SEVEN, THIRTEEN, QUERIES, _ = FULL_SIZE.values()


def predict(config: ChatConfig, gpu: str = "h100", precision: str = "fp8", **options: Any) -> ChatEstimate:
    recipe = load_recipe(precision)
    options = {"batches": [1, 8], **options}
    return estimate(config, recipe, plan_of(recipe, config), find_gpu(gpu), **options)


def test_full_sizes_are_the_papers() -> None:
    """Figures of the paper: 576 and 96 visual tokens; keys and values of a token in 16 bits."""
    assert [config.num_visual for config in FULL_SIZE.values()] == [576, 576, 672, 672]
    assert cache_bytes(SEVEN.decoder, "bf16", 1) == 524_288
    assert cache_bytes(THIRTEEN.decoder, "bf16", 1) == 819_200
    recipe = load_recipe("bf16")
    parameters = weights(SEVEN, recipe, plan_of(recipe, SEVEN)).nbytes / 2
    assert parameters == pytest.approx(12.67e9 - 3 * 122_918_400, rel=1e-3), "three blocks are not run"
    blocks = {key.split(".layers.")[1].split(".")[0] for key in component_shapes("vision_chat", SEVEN)
              if ".layers." in key}  # fmt: skip
    assert len(blocks) == 45


def test_a_step_reads_weights_and_cache() -> None:
    result = predict(SEVEN, precision="bf16", batches=[1, 8])
    gpu, recipe = result.gpu, load_recipe("bf16")
    decoder = weights(SEVEN, recipe, plan_of(recipe, SEVEN), ["decoder"]).nbytes
    for point in result.points:
        step = point.components[-1]
        past = step.sizes["past"]
        assert past == 576 + 64 + 64
        contents = point.batch * cache_bytes(SEVEN.decoder, "bf16", past + 1)
        assert step.floor_ms == pytest.approx(1e3 * (decoder + contents) / (1e9 * gpu.memory_gbps), rel=0.01)
        assert step.bound == "memory"
        assert point.first_token_ms == pytest.approx(point.image_ms + point.batch * point.prompt_ms)
        assert point.tokens_per_s == pytest.approx(1e3 * point.batch / point.token_ms)
        both = point.batch * cache_bytes(SEVEN.decoder, "bf16", 2 * (640 + 128))
        assert point.cache_bytes == both
        assert point.memory_bytes > result.weight_bytes + both
    one, eight = result.points
    assert one.token_ms < eight.token_ms < 2 * one.token_ms
    assert one.fits
    assert not predict(THIRTEEN, "rtx4090", "bf16").points[0].fits


@pytest.mark.slow
def test_what_makes_a_chat_dearer() -> None:
    small, large, asking = (predict(c, cost_per_hour=2.0).points[1] for c in (SEVEN, THIRTEEN, QUERIES))
    assert small.token_ms < large.token_ms
    assert small.image_ms < asking.image_ms
    assert len(asking.components) == 4
    longer = predict(SEVEN, new_tokens=512).points[1]
    assert longer.questions_per_s < small.questions_per_s
    assert longer.token_ms > small.token_ms
    assert small.cost == pytest.approx(2.0 / 3600 * 1e6 / small.questions_per_s)
    assert predict(SEVEN).points[0].cost is None
    assert any("at most 8" in line for line in predict(SEVEN, batches=[16]).assumptions)
    assert not any("at most 8" in line for line in predict(SEVEN).assumptions)


def test_shipped_precisions_cover_every_form() -> None:
    exact = arithmetic_of("fp8")
    for config in (InternVLConfig(), SEVEN, QUERIES):
        recipe = load_recipe("fp8")
        own = Arithmetic.of(recipe, plan_of(recipe, config)).low
        assert own.items() <= exact.low.items()
    low = {layer for layer in component_macs("decoder", SEVEN, {"text": 1, "past": 1}) if layer in exact.low}
    assert len(low) == 7


@pytest.mark.slow
def test_the_verb(chat_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["estimate", "--gpu", "l40s", "--batch", "1,8"]
    assert (
        main([*line, "--model", next(iter(FULL_SIZE)), "--cost-per-hour", "1", "--layers", "--evidence"]) == 0
    )
    out = capsys.readouterr().out
    for text in (
        "predicted, not measured",
        "ms to the first token",
        "576 positions",
        "nano-chat-int8: decoder",
        "1M",
    ):
        assert text in out
    assert main([*line, "--model", next(iter(FULL_SIZE)), "--image-size", "224", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["prompt_tokens"]) == ("ivl-export.chat-estimate/1", 256 + 64)

    assert main([*line, "--model", "nano-chat", "--json"]) == 0
    nano = json.loads(capsys.readouterr().out)
    assert main([*line, "--model", str(nano_chat_folder()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == nano
    assert main([*line, "--model", str(chat_bundle), "--precision", "bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"
    capsys.readouterr()
    assert main([*line, "--model", str(chat_bundle)]) == 5, "its own precision, fp32, has no peak"
    assert "fp32" in capsys.readouterr().err
    assert main([*line, "--model", "InternVL-Chat-ViT-6B-Vicuna-1B"]) == 4


def test_a_bundle_has_its_own_recipe(
    chat_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chat_bundle, tmp_path / "staging")
    (tmp_path / "staging" / "manifest.json").unlink()
    recipe = load_recipe("int8-weight").to_json()
    seal(tmp_path / "staging", replace(Bundle.open(chat_bundle).manifest, rules=recipe), tmp_path / "bundle")
    assert main(["estimate", "--gpu", "l40s", "--model", str(tmp_path / "bundle"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "int8-weight"


def test_tiles_and_grouped_keys_are_counted() -> None:
    """InternVL3.5-8B: a photograph is 13 tiles of 256 positions, 8 of its 32 heads have keys of their own."""
    config: Any = PUBLISHED["internvl3.5-8b"]
    assert cache_bytes(config.decoder, "bf16", 10) == 2 * 2 * 10 * config.decoder.num_hidden_layers * 8 * 128
    assert predict(config).prompt_tokens == 13 * 256 + 64
