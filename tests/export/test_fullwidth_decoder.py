"""One block of the chat decoders at true width: graphs in ONNX Runtime against torch, plain and 8 bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ivl_export.arrays import Array
from ivl_export.benchmarks.fullsize.make_checkpoint import LAYOUTS, make_checkpoint
from ivl_export.bundle.spec import ComponentSpec
from ivl_export.calibration.accuracy import compare
from ivl_export.engines.base import open_engine
from ivl_export.export.unquantized import export_plain
from ivl_export.models import ChatConfig, VisionConfig
from ivl_export.models.calls import Arrays
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.registry import component_module, component_spec
from ivl_export.pipeline.graph_steps import (
    GraphSource,
    graph_path,
    write_base_store,
    write_graph,
    write_quantised_store,
)
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import Recipe, Rule, plan_layers
from ivl_export.tests.calibration.reference import torch_runner

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

PRODUCTS = ("self_attn.[qkvo]_proj", "mlp.*_proj")
VOCABULARY = 1000  # the lookup and lm_head are not quantised, and cost most of the time
PAST, NEW = 12, 5

# Smallest cosine and SQNR in dB of any output. Measured (the worst output):
#              chat-7b         chat-13b
#   plain      1, 114.4
#   fp8        0.99472, 20.05
#   int8                       0.99430, 19.38
# The weights are drawn, and drawn weights have harder tails than trained ones.
BOUNDS = {
    "chat-7b": {"plain": (0.999999, 105.0), "fp8": (0.9925, 18.7)},
    "chat-13b": {"int8": (0.992, 18.0)},
}


@dataclass(frozen=True)
class Part:
    """A made checkpoint, ranges of its decoder's inputs, and fp32 torch on rows that did not set them."""

    layout: str
    checkpoint: Checkpoint
    keys: list[str]
    shapes: dict[str, tuple[int, int]]
    amax: dict[str, float]
    inputs: Arrays
    outputs: Arrays


@pytest.fixture(scope="module")
def part(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    layout: str = request.param
    folder = tmp_path_factory.mktemp(layout)
    config = LAYOUTS[layout]
    assert isinstance(config, ChatConfig)
    decoder = replace(config.decoder, num_hidden_layers=1, vocab_size=VOCABULARY)
    make_checkpoint(folder, ChatConfig(VisionConfig(16, 4, 1, 16, 28, 14), decoder, 28), depth=40)
    checkpoint = open_checkpoint(folder)
    yield measured(layout, checkpoint)
    shutil.rmtree(folder)


def measured(layout: str, checkpoint: Checkpoint) -> Part:
    spec = component_spec("decoder", checkpoint.model)
    with torch.device("meta"):
        module = component_module("decoder", checkpoint.model)
    load_state(module, checkpoint, torch.float32)
    run = torch_runner(module, spec)
    linears = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    table = checkpoint.load("model.embed_tokens.weight", torch.float32)
    amax: dict[str, float] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        amax[name] = max(amax.get(name, 0.0), float(x.abs().amax()))

    def embeds(seed: int, batch: int, length: int) -> Array:
        ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
        result: Array = table[ids].numpy()
        return result

    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, m in linears.items()
    ]
    run(first_step(embeds(0, 4, 24), spec))
    for handle in handles:
        handle.remove()

    cache = run(first_step(embeds(1, 2, PAST), spec))
    mask = np.ones((2, PAST + NEW), np.int64)
    mask[1, :3] = 0  # a row that is padded on the left
    inputs = {
        "input_embeds": embeds(2, 2, NEW),
        "positions": mask.cumsum(1)[:, PAST:] - 1,
        "attention_mask": mask,
        **{f"past_{name}": array for name, array in cache.items() if name != "logits"},
    }
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    return Part(layout, checkpoint, list(module.state_dict()), shapes, amax, inputs, run(inputs))


def first_step(x: Array, spec: ComponentSpec) -> Arrays:
    """Inputs of a first step, over a cache of one position that is hidden."""
    batch, length = x.shape[:2]
    mask = np.ones((batch, 1 + length), np.int64)
    mask[:, 0] = 0
    return {
        "input_embeds": x,
        "positions": np.tile(np.arange(length), (batch, 1)),
        "attention_mask": mask,
        **{
            t.name: np.zeros((batch, int(t.shape[1]), 1, int(t.shape[3])), np.float32)
            for t in spec.inputs[3:]
        },
    }


def check(part: Part, scheme: str, graph: Path) -> None:
    """The graph's outputs against fp32 torch's."""
    spec = component_spec("decoder", part.checkpoint.model)
    engine = open_engine("onnxruntime", spec, graph)
    try:
        result = engine.run(part.inputs)
    finally:
        engine.close()
    cosine, sqnr = BOUNDS[part.layout][scheme]
    for tensor in spec.outputs:
        metrics = compare(part.outputs[tensor.name], result[tensor.name])
        assert metrics.worst_cosine > cosine, (tensor.name, metrics)
        assert metrics.sqnr_db > sqnr, (tensor.name, metrics)


@pytest.mark.parametrize("part", ["chat-7b"], indirect=True)
def test_plain_graph(part: Part) -> None:
    exported = export_plain(part.checkpoint, part.checkpoint.path, ["decoder"], "fp32", zero_copy=True)
    check(part, "plain", exported.graphs["decoder"])


@pytest.mark.parametrize(("part", "scheme"), [("chat-7b", "fp8"), ("chat-13b", "int8")], indirect=["part"])
def test_quantised_graph(part: Part, tmp_path: Path, scheme: str) -> None:
    recipe = Recipe(scheme, tuple(Rule(f"model.layers.*.{layers}", scheme) for layers in PRODUCTS))
    planned = plan_layers(recipe, part.shapes)
    layers = list(planned.quantised)
    amax = {"decoder": {name: part.amax[name] for name in layers}}
    ranges = ActivationRanges(amax, "max", 4, "", True, 0, part.checkpoint.revision)
    source = GraphSource(part.checkpoint, recipe, planned, ranges)
    write_base_store(
        source, [key for key in part.keys if key.removesuffix(".weight") not in layers], tmp_path
    )
    write_quantised_store(source, layers, tmp_path)
    promised = write_graph(source, "decoder", tmp_path, "fp32", "onnxruntime")
    assert promised == dict.fromkeys(layers, scheme)
    assert len(promised) == 7
    check(part, scheme, tmp_path / graph_path("decoder", "fp32"))
    shutil.rmtree(tmp_path / "onnx")
