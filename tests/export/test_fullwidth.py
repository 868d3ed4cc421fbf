"""One block at InternVL-14B's widths: graphs in ONNX Runtime against torch, plain and quantised."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint
from ivl_export.calibration.accuracy import Metrics, compare
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.component_chain import Runner, Step, run_chain
from ivl_export.calibration.dataset import Batch
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.engines.base import open_engine
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer
from ivl_export.models.calls import Arrays
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.config import InternVLConfig
from ivl_export.models.load import meta_model
from ivl_export.models.registry import component_module, component_spec, sliced
from ivl_export.models.storage import read_header
from ivl_export.models.vit import resize_positions
from ivl_export.pipeline.graph_steps import (
    GraphSource,
    component_weights,
    graph_path,
    write_base_store,
    write_graph,
    write_quantised_store,
)
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import load_recipe, plan_layers
from ivl_export.tests.calibration.reference import torch_runner

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

COMPONENTS = ("vision", "qllama_query", "qllama_text")
POSITIONS = "vision_model.embeddings.position_embedding"
VOCABULARY = 1500  # the lookup and lm_head are wide, not quantised, and cost most of the time

PRODUCTS = {"vision": 4, "qllama_query": 7 + 4, "qllama_text": 7}
"""Quantised products of a block: qkv, proj, fc1, fc2; q, k, v, o, gate, up, down; the cross-attention's."""

Bound = tuple[float, float]

# Smallest cosine and SQNR in dB of any output. Measured (the worst output of a component):
#             vision          qllama_query     qllama_text
#   bf16      1, 122.9        1, 120.5
#   fp8       0.99897, 26.87  0.99705, 22.30   0.99419, 19.34
#   int8      0.99957, 30.65
# The weights are drawn, and drawn weights have harder tails than trained ones. A step over a cache, and INT8
# products of such a decoder, are tested at these widths in test_fullwidth_decoder.py.
_EXACT = (0.999999, 105.0)
BOUNDS: dict[str, dict[str, Bound]] = {
    "bf16": {"vision": _EXACT, "qllama_query": _EXACT},  # stored in 16 bits; computed in fp32
    "fp8": {"vision": (0.9985, 25.4), "qllama_query": (0.996, 20.9), "qllama_text": (0.992, 17.9)},
    "int8": {"vision": (0.9994, 29.2)},
}
RESIZED: Bound = (0.999999, 70.0)
"""Resized positions are rounded to 16 bits when they are stored: 74.8 dB measured at every size."""


@dataclass(frozen=True)
class Slice:
    """The checkpoint, ranges of a few scenes, and fp32 torch on scenes that were not calibrated on."""

    checkpoint: Checkpoint
    ranges: ActivationRanges
    steps: dict[str, Step]


def torch_reference(component: str, checkpoint: Checkpoint) -> Runner:
    """Loads the weights when it runs and frees them after: one component in memory at a time."""

    def run(inputs: Arrays) -> Arrays:
        with torch.device("meta"):
            module = component_module(component, checkpoint.config)
        load_state(module, checkpoint, torch.float32)
        return torch_runner(module, component_spec(component, checkpoint.config))(inputs)

    return run


def batch_of(checkpoint: Checkpoint, size: int) -> Batch:
    """One scene that calibration did not see, at ``size`` pixels."""
    tokenizer = SentencePieceTokenizer(checkpoint.path / "tokenizer.model")
    unseen = scenes_calibration(1, seed=1)
    return next(unseen.batches(ImageSettings(size=size), tokenizer, 1))


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slice]:
    folder = tmp_path_factory.mktemp("slice")
    config = sliced(InternVLConfig(), 1, 1)
    config = replace(config, qllama=replace(config.qllama, vocab_size=VOCABULARY))
    assert config.has_cross_attention(0)  # the text's components leave it out
    make_checkpoint(folder, config)
    checkpoint = open_checkpoint(folder)
    settings = ImageSettings.load(folder / "preprocessor_config.json")
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    ranges = calibrate(checkpoint, COMPONENTS, scenes_calibration(2), settings, tokenizer, batch_size=2)
    runners = {name: torch_reference(name, checkpoint) for name in COMPONENTS}
    steps = {
        step.component: step
        for step in run_chain(runners, batch_of(checkpoint, settings.size), checkpoint.model)
    }
    assert set(steps) == set(COMPONENTS)
    yield Slice(checkpoint, ranges, steps)
    shutil.rmtree(folder)


Stores = Callable[[str], tuple[GraphSource, Path]]


@pytest.fixture(scope="module")
def stores(part: Slice, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """Recipe -> its source and the folder with its weights, written on first use."""
    home = tmp_path_factory.mktemp("stores")

    @cache
    def write(name: str) -> tuple[GraphSource, Path]:
        graphs_of = source(part.checkpoint, name, part.ranges)
        keys, layers = component_weights(graphs_of, COMPONENTS)
        write_base_store(graphs_of, keys, home / name)
        if layers:
            write_quantised_store(graphs_of, layers, home / name)
        return graphs_of, home / name

    yield write
    shutil.rmtree(home)


def source(checkpoint: Checkpoint, name: str, ranges: ActivationRanges) -> GraphSource:
    recipe = load_recipe(name)
    linears = (m for m in meta_model(checkpoint).named_modules() if isinstance(m[1], torch.nn.Linear))
    shapes = {layer: (m.out_features, m.in_features) for layer, m in linears}
    return GraphSource(checkpoint, recipe, plan_layers(recipe, shapes), ranges if recipe.quantises else None)


def compared(
    source_of: GraphSource, component: str, root: Path, step: Step
) -> tuple[dict[str, Metrics], int]:
    """Metrics of every output of the graph in ONNX Runtime, and how many products are quantised."""
    promised = write_graph(source_of, component, root, "fp32", "onnxruntime")
    spec = component_spec(component, source_of.checkpoint.config)
    engine = open_engine("onnxruntime", spec, root / graph_path(component, "fp32"))
    try:
        result = engine.run(step.inputs)
    finally:
        engine.close()
    return {t.name: compare(step.outputs[t.name], result[t.name]) for t in spec.outputs}, len(promised)


@pytest.mark.parametrize(("recipe", "component"), [(r, c) for r, bounds in BOUNDS.items() for c in bounds])
def test_graphs(part: Slice, stores: Stores, recipe: str, component: str) -> None:
    result, root = stores(recipe)
    actual, promised = compared(result, component, root, part.steps[component])
    assert promised == (PRODUCTS[component] if result.recipe.quantises else 0)
    check(actual, BOUNDS[recipe][component])


def test_another_size(part: Slice, tmp_path: Path) -> None:
    """A checkpoint whose stored positions are the resized ones, as published for that size."""
    size = 448
    old = part.checkpoint
    grid = (size // old.config.vision.patch_size,) * 2
    positions = resize_positions(old.load(POSITIONS, torch.float32), grid)
    save_file({POSITIONS: positions.contiguous()}, tmp_path / "positions.safetensors")
    config = replace(old.config, vision=replace(old.config.vision, image_size=size))
    tensors = {**old.tensors, **read_header(tmp_path / "positions.safetensors")}
    larger = replace(old, model=config, tensors=tensors)

    # torch resizes while it runs: the graph of the larger checkpoint must equal it
    (step,) = run_chain({"vision": torch_reference("vision", old)}, batch_of(old, size), old.model)
    for recipe, bound in (("bf16", RESIZED), ("fp8", BOUNDS["fp8"]["vision"])):
        graphs_of, root = source(larger, recipe, part.ranges), tmp_path / recipe
        keys, layers = component_weights(graphs_of, ["vision"])
        write_base_store(graphs_of, keys, root)
        if layers:
            write_quantised_store(graphs_of, layers, root)
        result, _ = compared(graphs_of, "vision", root, step)
        check(result, bound)
        shutil.rmtree(root)


def check(found: dict[str, Metrics], bound: Bound) -> None:
    cosine, sqnr = bound
    for name, metrics in found.items():
        assert metrics.worst_cosine > cosine, (name, metrics)
        assert metrics.sqnr_db > sqnr, (name, metrics)
