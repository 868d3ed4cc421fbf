from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from ivl_export.engines.onnx_graph import read_graph
from ivl_export.engines.products import find_attention, find_products
from ivl_export.errors import IntegrityError

if TYPE_CHECKING:
    from .conftest import Make


@pytest.mark.parametrize(("kind", "dtype", "scheme"), [("vit", "bf16", "fp8"), ("step", "fp32", "int8")])
def test_structure_equals_onnx(make: Make, kind: str, dtype: str, scheme: str) -> None:
    path = make(kind, dtype=dtype, scheme=scheme).path
    graph, model = read_graph(path), onnx.load(path, load_external_data=False)
    nodes = [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]
    assert [(n.op, n.name, n.inputs, n.outputs) for n in graph.nodes] == nodes
    assert {k: v[1] for k, v in graph.initializers.items()} == {
        i.name: tuple(i.dims) for i in model.graph.initializer
    }
    assert list(graph.inputs) == [i.name for i in model.graph.input]
    assert {scheme, dtype} <= graph.element_types
    split = next((n for n in graph.nodes if n.op == "Split"), None)
    assert split is None or split.ints == {"axis": -1, "num_outputs": 3}


def test_constant_nodes_and_packed_dims_count(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor("c", onnx.TensorProto.BFLOAT16, [2, 3], bytes(12), raw=True)
    node = onnx.helper.make_node("Constant", [], ["w"], "const", value=value)
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("w", 16, [2, 3])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "c.onnx")
    assert read_graph(tmp_path / "c.onnx").initializers == {"w": ("bf16", (2, 3))}


def test_products_say_what_the_graph_quantises(make: Make) -> None:
    sample = make("vit", dtype="bf16", scheme="int8", plain=("mlp.fc2",), width=128)
    by_name = {p.node: p for p in find_products(read_graph(sample.path))}
    assert {name: p.scheme for name, p in by_name.items()} == {
        "attn.qkv": "int8",
        "attn.proj": "int8",
        "mlp.fc1": "int8",
        "mlp.fc2": "",
    }
    qkv = by_name["attn.qkv"]
    assert (qkv.weight, qkv.k, qkv.n, qkv.activation, qkv.stored) == (
        "attn.qkv.weight",
        128,
        384,
        "int8",
        "int8",
    )


def test_attention_is_found_as_an_operator_and_as_products(make: Make) -> None:
    assert [a.nodes for a in find_attention(read_graph(make("vit").path))] == [("attn/sdpa",)]
    decomposed = read_graph(make("vit", decomposed=True).path)
    assert [a.nodes for a in find_attention(decomposed)] == [("qk", "softmax", "pv")]


def test_broken_files_are_refused(make: Make, tmp_path: Path) -> None:
    whole = make("mlp").path.read_bytes()
    for name, data in {"empty": b"", "text": b"not a model\n" * 9, "cut": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(IntegrityError, match="not a valid ONNX model"):
            read_graph(tmp_path / name)
    with pytest.raises(IntegrityError, match="no ONNX graph"):
        read_graph(tmp_path / "absent")


def test_damaged_bytes_never_do_worse_than_refuse(make: Make, tmp_path: Path) -> None:
    whole, random_ = make("vit", dtype="bf16", scheme="fp8").path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random_.choice([1, 3, 20])):
            data[random_.randrange(len(data))] = random_.randrange(256)
        (tmp_path / "damaged").write_bytes(data)
        try:
            find_attention(read_graph(tmp_path / "damaged"))
        except IntegrityError:
            refused += 1
    assert 20 < refused <= 200
