"""Verification on real outputs of the exporter and the Q/DQ writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.onnxruntime import read_onnxruntime
from ivl_export.verify.rtx import read_rtx

if TYPE_CHECKING:
    from ivl_export.models.checkpoint import Checkpoint
    from ivl_export.quantization.qdq_nodes import Style


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """One ViT layer without QK-norm, one QLLaMA layer, random weights, in the published layout."""
    import torch
    from safetensors.torch import save_file

    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.config import InternVLConfig, QLlamaConfig, VisionConfig
    from ivl_export.models.internvl import InternVLModel

    vision = VisionConfig(64, 1, 2, 128, image_size=28, patch_size=14, qk_normalization=False)
    qllama = QLlamaConfig(64, 1, 2, 128, vocab_size=64)
    config = InternVLConfig(vision, qllama, clip_embed_dim=32, attn_pool_num_heads=2, num_query_token=4)
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in InternVLModel(config).state_dict().items()}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_published()))
    save_file(state, folder / "model.safetensors")
    return open_checkpoint(folder)


def export(
    checkpoint: Checkpoint, folder: Path, scheme: str, compute: str, style: Style
) -> tuple[Path, dict[str, str]]:
    """The quantised vision graph and its promise."""
    from ivl_export.export.binding import bind, save_graph
    from ivl_export.export.trace import export_component
    from ivl_export.export.weight_store import StoredTensor, StoreWriter, open_store
    from ivl_export.quantization.qdq import write_qdq
    from ivl_export.quantization.quantize import quantise, stored_names

    model = export_component("vision", checkpoint, compute)
    weights = {}
    for name in list(model.graph.initializers):
        if name in checkpoint.tensors:
            weights[name] = checkpoint.load(name)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(("qkv.weight", "fc1.weight"))]
    promised = write_qdq(
        model, dict.fromkeys(layers, scheme), dict.fromkeys(layers, 4.0), compute=compute, style=style
    )
    for layer in layers:
        values, scale = quantise(weights.pop(f"{layer}.weight"), scheme)
        parts = (values, scale.flatten().bfloat16(), scale.flatten())
        weights.update(zip(stored_names(layer, scheme, "bf16"), parts, strict=True))
    folder.mkdir()
    entries = [
        StoredTensor(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in weights.items()
    ]
    with StoreWriter(folder / "store.safetensors", entries) as store:
        for name, tensor in weights.items():
            store.write(name, tensor)
    bind(model, open_store(folder / "store.safetensors"), folder)
    save_graph(model, folder / "vision.onnx")
    return folder / "vision.onnx", promised


@pytest.mark.slow
def test_quantised_exports_keep_their_promise(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from ivl_export.models.registry import component_spec

    spec = component_spec("vision", checkpoint.config)
    names = {"vision_model.encoder.layers.0.attn.qkv", "vision_model.encoder.layers.0.mlp.fc1"}
    graph, promised = export(checkpoint, tmp_path / "gpu", "fp8", "bf16", "tensorrt")
    assert set(promised) == names
    build_engine(graph, spec, tmp_path / "vision.engine")
    report = read_rtx(tmp_path / "vision.engine", graph)
    check_expectations(report, promised)
    assert report.precisions["fp8xfp8"] == 2
    assert len(report.attention) == 2  # the block's and the pooling head's
    graph, promised = export(checkpoint, tmp_path / "cpu", "int8", "fp32", "onnxruntime")
    check_expectations(read_onnxruntime(graph), promised)
