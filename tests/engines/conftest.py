"""Small graphs of this model's shapes, made with onnx.helper, in fp32 or bf16, quantised or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec

Array = np.ndarray[Any, Any]
FLOATS = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "fp16": (TensorProto.FLOAT16, np.float16),
}
LIMITS = {"fp8": 448.0, "int8": 127.0}
AMAX = 4.0
AXES = (Axis("batch", 1, 2, 4), Axis("text", 1, 1, 4), Axis("past", 4, 8, 12), Axis("total", 5, 9, 16))


@dataclass(frozen=True)
class Sample:
    """A saved graph, its contract, its fp32 weights and the schemes of its quantised products."""

    path: Path
    spec: ComponentSpec
    promised: dict[str, str]
    weights: dict[str, Array]


@dataclass
class Writer:
    """Collects nodes and initializers. ``plain`` names products that stay unquantised."""

    dtype: str = "fp32"
    scheme: str | None = None
    plain: tuple[str, ...] = ()
    own_q: bool = True
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    values: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    promised: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)

    @property
    def kind(self) -> int:
        return int(FLOATS[self.dtype][0])

    def op(
        self, op: str, inputs: list[str], name: str, *, output: str | None = None, **attributes: Any
    ) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output or f"{name}.y"], name, **attributes))
        return output or f"{name}.y"

    def tensor(self, name: str, array: Array, kind: int | None = None) -> str:
        if kind is None:
            self.values.append(numpy_helper.from_array(array, name))
        else:
            self.values.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
        return name

    def floats(self, name: str, array: Any) -> str:
        kind, numpy_type = FLOATS[self.dtype]
        return self.tensor(name, np.asarray(array, np.float32).astype(numpy_type), kind)

    def ints(self, name: str, *numbers: int) -> str:
        return self.tensor(name, np.array(numbers, np.int64))

    def linear(self, x: str, name: str, k: int, n: int) -> str:
        weight = (self.rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
        self.weights[name] = weight
        scheme = None if name in self.plain else self.scheme
        if scheme is None:
            turned = self.op("Transpose", [self.floats(f"{name}.weight", weight)], f"{name}/t", perm=[1, 0])
            return self.op("MatMul", [x, turned], name)
        self.promised[name] = scheme
        limit, kind = LIMITS[scheme], TensorProto.FLOAT8E4M3FN if scheme == "fp8" else TensorProto.INT8
        if x not in self.shared or self.own_q:
            zero = self.tensor(f"{name}.input_zero", np.zeros((), np.int8), kind)
            scale = self.floats(f"{name}.input_scale", AMAX / limit)
            rounded = self.op("QuantizeLinear", [x, scale, zero], f"{name}/q")
            self.shared[x] = self.op("DequantizeLinear", [rounded, scale, zero], f"{name}/dq")
        scales = round_to(np.abs(weight).max(1) / limit, self.dtype)
        stored = quantise(weight / scales[:, None], scheme)
        self.tensor(f"{name}.weight", stored, kind)
        factors = [f"{name}.weight", self.floats(f"{name}.weight_scale", scales)]
        if scheme == "int8":
            factors.append(self.tensor(f"{name}.weight_zero", np.zeros(n, np.int8)))
        dequantised = self.op("DequantizeLinear", factors, f"{name}/wdq", axis=0)
        turned = self.op("Transpose", [dequantised], f"{name}/t", perm=[1, 0])
        return self.op("MatMul", [self.shared[x], turned], name)

    def norm(self, x: str, name: str, width: int) -> str:
        return self.op(
            "RMSNormalization", [x, self.floats(f"{name}.weight", np.ones(width))], name, epsilon=1e-6
        )

    def heads(self, x: str, name: str, heads: int, head_dim: int, rows: int = -1) -> str:
        split = self.op("Reshape", [x, self.ints(f"{name}.shape", 0, rows, heads, head_dim)], f"{name}/split")
        return self.op("Transpose", [split], f"{name}/heads", perm=[0, 2, 1, 3])

    def merge(self, x: str, name: str, width: int) -> str:
        turned = self.op("Transpose", [x], f"{name}/rows", perm=[0, 2, 1, 3])
        return self.op("Reshape", [turned, self.ints(f"{name}.merge", 0, -1, width)], f"{name}/merge")

    def save(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Sample:
        def infos(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
            kinds = {"float": self.kind, "int64": TensorProto.INT64}
            return [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in specs]

        graph = helper.make_graph(self.nodes, "test", infos(inputs), infos(outputs), self.values)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        onnx.save(
            model, path, save_as_external_data=True, location=f"{path.stem}.weights", size_threshold=1024
        )
        onnx.checker.check_model(str(path), full_check=True)
        used = {d for t in (*inputs, *outputs) for d in t.shape}
        axes = tuple(axis for axis in AXES if axis.name in used)
        return Sample(path, ComponentSpec("part", inputs, outputs, axes), self.promised, self.weights)


def round_to(values: Array, dtype: str) -> Array:
    return np.asarray(values, np.float32).astype(FLOATS[dtype][1]).astype(np.float32)


def quantise(values: Array, scheme: str) -> Array:
    limit = LIMITS[scheme]
    if scheme == "fp8":
        return np.clip(values, -limit, limit).astype(ml_dtypes.float8_e4m3fn)
    return np.clip(np.round(values), -limit - 1, limit).astype(np.int8)


def write_mlp(writer: Writer, path: Path, width: int = 64) -> Sample:
    """fc1 -> ReLU -> fc2 on [batch, 5, width]."""
    hidden = writer.op("Relu", [writer.linear("x", "fc1", width, 2 * width)], "act")
    writer.op("Identity", [writer.linear(hidden, "fc2", 2 * width, width)], "out", output="y")
    shape = ("batch", 5, width)
    return writer.save(path, (TensorSpec("x", "float", shape),), (TensorSpec("y", "float", shape),))


def write_vit(
    writer: Writer,
    path: Path,
    width: int = 128,
    heads: int = 4,
    decomposed: bool = False,
    qk_norm: bool = True,
) -> Sample:
    """One InternViT block: qkv, attention, proj, fc1, GELU, fc2."""
    w = writer
    parts = ["q", "k", "v"]
    qkv = w.linear(w.norm("x", "norm1", width), "attn.qkv", width, 3 * width)
    w.nodes.append(helper.make_node("Split", [qkv], parts, "split", axis=-1, num_outputs=3))
    normed = [w.norm("q", "q_norm", width), w.norm("k", "k_norm", width), "v"] if qk_norm else parts
    q, k, v = (w.heads(x, part, heads, width // heads) for x, part in zip(normed, parts, strict=True))
    if decomposed:
        scores = w.op("MatMul", [q, w.op("Transpose", [k], "kt", perm=[0, 1, 3, 2])], "qk")
        scaled = w.op("Mul", [scores, w.floats("scale", (width // heads) ** -0.5)], "scaled")
        mixed = w.op("MatMul", [w.op("Softmax", [scaled], "softmax", axis=-1), v], "pv")
    else:
        mixed = w.op("Attention", [q, k, v], "attn/sdpa")
    x = w.op("Add", ["x", w.linear(w.merge(mixed, "attn", width), "attn.proj", width, width)], "add1")
    hidden = w.op("Gelu", [w.linear(w.norm(x, "norm2", width), "mlp.fc1", width, 2 * width)], "gelu")
    w.op("Add", [x, w.linear(hidden, "mlp.fc2", 2 * width, width)], "add2", output="y")
    shape = ("batch", 17, width)
    return w.save(path, (TensorSpec("x", "float", shape),), (TensorSpec("y", "float", shape),))


def write_patches(writer: Writer, path: Path, width: int = 128) -> Sample:
    """A patch embedding: a Conv of 14 x 14 patches of [batch, 3, 56, 56], then a product."""
    w = writer
    kernel = w.rng.standard_normal((width, 3, 14, 14)) / 24
    patches = w.op(
        "Conv", ["x", w.floats("patch.weight", kernel), w.floats("patch.bias", np.zeros(width))], "patch",
        kernel_shape=[14, 14], strides=[14, 14],
    )  # fmt: skip
    flat = w.op("Reshape", [patches, w.ints("flat", 0, width, -1)], "flat/reshape")
    rows = w.op("Transpose", [flat], "rows", perm=[0, 2, 1])
    w.op("Identity", [w.linear(rows, "proj", width, width)], "out", output="y")
    outputs = (TensorSpec("y", "float", ("batch", 16, width)),)
    return w.save(path, (TensorSpec("x", "float", ("batch", 3, 56, 56)),), outputs)


def write_attention(
    writer: Writer, path: Path, rows: int = 32, head_size: int = 64, heads: int = 2
) -> Sample:
    """Attention as single products; with a scheme, q, k, v and the weights of the mean are quantised."""
    w, width, scheme, writer.scheme = writer, heads * head_size, writer.scheme, None

    def rounded(x: str, name: str, scale: float) -> str:
        if scheme is None:
            return x
        kind = TensorProto.FLOAT8E4M3FN if scheme == "fp8" else TensorProto.INT8
        both = [w.floats(f"{name}.s", scale), w.tensor(f"{name}.z", np.zeros((), np.int8), kind)]
        return w.op(
            "DequantizeLinear", [w.op("QuantizeLinear", [x, *both], f"{name}/q"), *both], f"{name}/dq"
        )

    q, k, v = (w.heads(w.norm(w.linear("x", n, width, width), f"{n}_norm", width), n, heads, head_size, rows)
               for n in "qkv")  # fmt: skip
    q = rounded(w.op("Mul", [q, w.floats("scale", head_size**-0.5)], "scaled"), "qq", 0.02)
    k = rounded(w.op("Transpose", [k], "kt", perm=[0, 1, 3, 2]), "kq", 0.02)
    mean = w.op("Softmax", [w.op("MatMul", [q, k], "qk")], "softmax", axis=-1)
    mixed = w.op("MatMul", [rounded(mean, "mq", 1 / LIMITS[scheme or "fp8"]), rounded(v, "vq", 0.02)], "pv")
    w.op("Identity", [w.linear(w.merge(mixed, "attn", width), "proj", width, width)], "out", output="y")
    shape = ("batch", rows, width)
    sample = w.save(path, (TensorSpec("x", "float", shape),), (TensorSpec("y", "float", shape),))
    return Sample(path, sample.spec, {} if scheme is None else {"qk": scheme, "pv": scheme}, sample.weights)


def write_step(writer: Writer, path: Path, width: int = 128, heads: int = 4) -> Sample:
    """One LLaMA layer with past keys and values and an explicit mask, on token ids."""
    w, head_dim = writer, width // heads
    x = w.op("Gather", [w.floats("embed", w.rng.standard_normal((32, width))), "input_ids"], "embed_tokens")
    normed = w.norm(x, "norm", width)
    q, k, v = (w.linear(normed, f"self_attn.{n}_proj", width, width) for n in "qkv")
    q, k, v = (w.heads(t, n, heads, head_dim) for t, n in ((q, "q"), (k, "k"), (v, "v")))
    w.op("Identity", [k], "new_key", output="key.0")
    w.op("Identity", [v], "new_value", output="value.0")
    k = w.op("Concat", ["past_key.0", k], "keys", axis=2)
    v = w.op("Concat", ["past_value.0", v], "values", axis=2)
    seen = w.op("Cast", ["attention_mask"], "seen", to=w.kind)
    bias = w.op("Mul", [w.op("Sub", [seen, w.floats("one", 1.0)], "hidden"), w.floats("big", 1e30)], "bias")
    bias = w.op("Unsqueeze", [bias, w.ints("axes", 1, 2)], "bias4d")
    text = w.op("Shape", ["input_ids"], "text", start=1, end=2)
    rows = w.op("Concat", [w.ints("ones", 1, 1), text, w.ints("unit", 1)], "rows", axis=0)
    bias = w.op("Expand", [bias, rows], "mask")  # ONNX Runtime needs a mask row for every new position
    mixed = w.op("Attention", [q, k, v, bias], "self_attn/sdpa")
    x = w.op(
        "Add", [x, w.linear(w.merge(mixed, "self_attn", width), "self_attn.o_proj", width, width)], "add1"
    )
    gate, up = (w.linear(x, f"mlp.{n}_proj", width, 2 * width) for n in ("gate", "up"))
    act = w.op("Mul", [w.op("Mul", [gate, w.op("Sigmoid", [gate], "sig")], "silu"), up], "act")
    x = w.op("Add", [x, w.linear(act, "mlp.down_proj", 2 * width, width)], "add2")
    last = w.op("Slice", [x, w.ints("from", -1), w.ints("to", 1 << 31), w.ints("dim", 1)], "last")
    row = w.op("Squeeze", [last, "dim"], "row")
    plain, w.scheme = w.scheme, None
    w.op("Identity", [w.linear(row, "lm_head", width, 32)], "out", output="logits")
    w.scheme = plain
    cache = ("batch", heads, "past", head_dim)
    new = ("batch", heads, "text", head_dim)
    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "text")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        TensorSpec("past_key.0", "float", cache),
        TensorSpec("past_value.0", "float", cache),
    )
    outputs = (
        TensorSpec("logits", "float", ("batch", 32)),
        TensorSpec("key.0", "float", new),
        TensorSpec("value.0", "float", new),
    )
    return w.save(path, inputs, outputs)


Make = Callable[..., Sample]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make("vit", dtype="bf16", scheme="fp8", width=128)`` -> :class:`Sample`."""
    writers: dict[str, Make] = {
        "mlp": write_mlp,
        "vit": write_vit,
        "step": write_step,
        "patches": write_patches,
        "attention": write_attention,
    }

    def build(kind: str, **options: Any) -> Sample:
        own = {k: options.pop(k) for k in ("dtype", "scheme", "plain", "own_q") if k in options}
        writer = Writer(**own)
        path = tmp_path / f"{kind}.{writer.dtype}.{writer.scheme}.onnx"
        return writers[kind](writer, path, **options)

    return build
