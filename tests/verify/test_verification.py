from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.engines.tensorrt.shapes import profiles_of
from ivl_export.errors import BuildError, IntegrityError, UsageError
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.program import program_digest, read_programs
from ivl_export.verify.report import VerificationReport, VerifiedAttention
from ivl_export.verify.rtx import read_rtx

if TYPE_CHECKING:
    from .conftest import Make, Sample

    Prove = Callable[..., tuple[Sample, VerificationReport]]


@pytest.fixture
def prove(make: Make, tmp_path: Path) -> Prove:
    pytest.importorskip("tensorrt_rtx")

    def run(kind: str, target: str = "sm89", **options: Any) -> tuple[Sample, VerificationReport]:
        sample = make(kind, **options)
        engine = tmp_path / "part.engine"
        build_engine(sample.path, sample.spec, engine, target=target)
        return sample, read_rtx(engine, sample.path)

    return run


@pytest.mark.parametrize(("scheme", "target"), [("fp8", "sm89"), ("fp8", "sm120"), ("int8", "sm80")])
def test_every_promised_product_runs_in_eight_bits(prove: Prove, scheme: str, target: str) -> None:
    sample, report = prove("vit", target, dtype="bf16", scheme=scheme)
    assert report.precisions == {f"{scheme}x{scheme}": 4}
    assert report.fallbacks == ()
    assert [g.weight for g in report.gemms] == [f"{g.node}.weight" for g in report.gemms]
    assert all(g.cause == "" and g.scheme == scheme for g in report.gemms)
    assert (report.fused_attention, len(report.attention), report.profiles) == (1, 1, 1)
    assert report.attention[0].types == ("bf16", "bf16", "bf16")
    check_expectations(report, sample.promised)
    check_expectations(report, {f"{name}.weight": s for name, s in sample.promised.items()})
    assert VerificationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_merged_products_keep_their_names(prove: Prove) -> None:
    sample, report = prove("step", dtype="bf16", scheme="fp8")
    gemms = {g.node: g for g in report.gemms}
    qkv = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
    assert all(gemms[name].merged == qkv for name in qkv)
    assert gemms["mlp.up_proj"].merged == ("mlp.gate_proj", "mlp.up_proj")
    assert gemms["mlp.down_proj"].merged == ()
    assert gemms["lm_head"].precision == "bf16xbf16"
    assert gemms["lm_head"].cause == "the graph quantises neither factor"
    assert report.fused_attention == 1
    check_expectations(report, sample.promised)


@pytest.mark.parametrize("decomposed", [False, True])
def test_bf16_runs_in_bf16(prove: Prove, decomposed: bool) -> None:
    _, report = prove("vit", dtype="bf16", decomposed=decomposed)
    assert report.precisions == {"bf16xbf16": 4}
    assert report.fused_attention == len(report.attention) == 1
    check_expectations(report, dict.fromkeys(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], "bf16"))


def test_a_broken_promise_names_layer_and_cause(prove: Prove) -> None:
    sample, report = prove("vit", dtype="bf16", scheme="fp8", plain=("mlp.fc2",))
    check_expectations(report, sample.promised)
    with pytest.raises(BuildError) as caught:
        check_expectations(report, {**sample.promised, "mlp.fc2": "fp8"})
    assert caught.value.why == ("mlp.fc2: promised fp8, runs bf16xbf16 (the graph quantises neither factor).")
    assert caught.value.exit_code == 6
    with pytest.raises(BuildError, match=r"attn\.qkv: promised int8, runs fp8xfp8"):
        check_expectations(report, {**sample.promised, "attn.qkv": "int8"})
    with pytest.raises(BuildError, match=r"absent: promised fp8, the graph has no such"):
        check_expectations(report, {**sample.promised, "absent": "fp8"})
    with pytest.raises(BuildError, match=r"attn\.proj: runs fp8xfp8, which nothing promised"):
        check_expectations(report, {k: v for k, v in sample.promised.items() if k != "attn.proj"})
    with pytest.raises(UsageError, match="Unknown scheme 'int3'"):
        check_expectations(report, {"attn.qkv": "int3"})


def test_an_engine_of_another_graph_is_found_out(make: Make, tmp_path: Path) -> None:
    """The promise is held against the engine, not the graph: a bf16 engine of the same layers fails."""
    pytest.importorskip("tensorrt_rtx")
    plain, promised = make("vit", dtype="bf16"), make("vit", dtype="bf16", scheme="fp8")
    engine = tmp_path / "part.engine"
    build_engine(plain.path, plain.spec, engine)
    report = read_rtx(engine, promised.path)
    assert [g.node for g in report.fallbacks] == list(promised.promised)
    with pytest.raises(BuildError, match=r"4 of 4 promised .* \(the builder chose a 16- or 32-bit kernel"):
        check_expectations(report, promised.promised)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_real_fallback_fails_the_promise(prove: Prove, scheme: str) -> None:
    """Without norms after q and k, TensorRT-RTX 1.7 cuts the joint q/k/v weight and leaves 8 bits."""
    sample, report = prove("vit", dtype="bf16", scheme=scheme, qk_norm=False)
    assert [(g.node, g.precision) for g in report.fallbacks] == [("attn.qkv", "bf16xbf16")]
    with pytest.raises(BuildError, match=r"attn\.qkv: .* \(its result is split at once"):
        check_expectations(report, sample.promised)


@pytest.mark.parametrize(
    ("dtype", "head_size", "decomposed", "cause"),
    [
        ("bf16", 8, True, "head size 8: fused kernels take 9 at least"),
        ("bf16", 8, False, "head size 8: fused kernels take 9 at least"),
        ("bf16", 9, False, ""),
        ("bf16", 256, False, ""),
        ("bf16", 257, False, "head size 257: fused kernels take 256 at most"),
        ("fp32", 64, False, "there is no fused kernel in fp32"),
    ],
)
def test_which_attentions_are_fused(
    prove: Prove, dtype: str, head_size: int, decomposed: bool, cause: str
) -> None:
    _, report = prove("vit", dtype=dtype, width=2 * head_size, heads=2, decomposed=decomposed)
    (attention,) = report.attention
    assert attention.nodes == (("qk", "softmax", "pv") if decomposed else ("attn/sdpa",))
    assert (attention.head_size, attention.fused, attention.cause) == (head_size, not cause, cause)
    assert attention.types == (dtype,) * 3
    check_expectations(report, {"attn.qkv": dtype, attention.nodes[0]: dtype})


@pytest.mark.parametrize(
    ("scheme", "rows", "head_size", "cause"),
    [
        ("fp8", 32, 64, ""),
        ("fp8", 17, 64, "17 rows: fused FP8 kernels take 32 at least"),
        ("fp8", 32, 8, ""),
        ("fp8", 32, 264, "head size 264: fused kernels take 256 at most"),
        ("int8", 32, 64, "there is no fused kernel in int8"),
    ],
)
def test_quantised_attention(prove: Prove, scheme: str, rows: int, head_size: int, cause: str) -> None:
    sample, report = prove("attention", dtype="bf16", scheme=scheme, rows=rows, head_size=head_size)
    (attention,) = report.attention
    assert (attention.fused, attention.cause) == (not cause, cause)
    assert attention.types == (scheme,) * 3
    check_expectations(report, sample.promised)
    with pytest.raises(BuildError, match=f"qk: promised bf16, runs {scheme}x{scheme}x{scheme}"):
        check_expectations(report, {"qk": "bf16"})


def test_attention_that_was_not_quantised_breaks_its_promise(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    promised = make("attention", dtype="bf16", scheme="fp8")
    plain = make("attention", dtype="bf16")
    build_engine(plain.path, plain.spec, tmp_path / "part.engine")
    report = read_rtx(tmp_path / "part.engine", promised.path)
    with pytest.raises(BuildError, match=r"qk: .* bf16xbf16xbf16 \(its fp8 values are dequantised before it"):
        check_expectations(report, promised.promised)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_sizes_that_are_no_multiple_of_16_still_run_in_eight_bits(prove: Prove, scheme: str) -> None:
    sample, report = prove("mlp", dtype="bf16", scheme=scheme, width=63)
    assert report.precisions == {f"{scheme}x{scheme}": 2}
    check_expectations(report, sample.promised)


@pytest.mark.parametrize(("scheme", "bits"), [("fp8", 8), ("int8", 8), (None, 16)])
def test_weights_are_stored_once_at_their_size(prove: Prove, scheme: str | None, bits: int) -> None:
    _, report = prove("step", dtype="bf16", scheme=scheme)
    sizes = {g.node: g.weight_bits for g in report.gemms}
    assert sizes == dict.fromkeys(sizes, bits) | {"lm_head": 16}
    assert {g.node: g.shape for g in report.gemms}["mlp.gate_proj"] == (256, 128)
    embedding = 2 * 32 * 128
    assert report.weight_bytes + embedding < report.constant_bytes < report.file_bytes
    assert report.constant_bytes < report.weight_bytes + embedding + 8192  # scales, norms


def test_a_convolution_is_a_product_whose_channels_are_padded_to_four(prove: Prove) -> None:
    sample, report = prove("patches", dtype="bf16", scheme="fp8")
    (patch,) = report.convolutions
    assert (patch.op, patch.precision, patch.weight) == ("Conv", "bf16xbf16", "patch.weight")
    assert patch.weight_bits == 16 * 4 / 3
    assert report.precisions == {"fp8xfp8": 1}
    check_expectations(report, {**sample.promised, "patch": "bf16"})
    with pytest.raises(
        BuildError, match=r"patch: promised fp8, runs bf16xbf16 \(the graph quantises neither"
    ):
        check_expectations(report, {**sample.promised, "patch": "fp8"})


def test_profiles_are_reported_together(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample, engine = make("mlp", dtype="bf16", scheme="int8"), tmp_path / "part.engine"
    build_engine(sample.path, sample.spec, engine, profiles=({}, {"batch": (1, 1, 1)}))
    report = read_rtx(engine, sample.path)
    assert report.profiles == 2
    check_expectations(report, sample.promised)


@pytest.mark.slow
def test_two_builds_compute_the_same(make: Make, tmp_path: Path) -> None:
    """Bytes may differ, programs and weights do not; another weight or another scale is seen."""
    pytest.importorskip("tensorrt_rtx")
    sample = make("step", dtype="bf16", scheme="int8")
    profiles = profiles_of(sample.spec)
    engines = [tmp_path / f"{i}.engine" for i in range(3)]
    for engine in engines:
        build_engine(sample.path, sample.spec, engine, profiles=profiles)
    first, *others = [program_digest(engine) for engine in engines]
    assert len(first) == 64
    assert others == [first, first]
    assert read_rtx(engines[0], sample.path).program == first

    model = onnx.load(sample.path)
    for name in ("mlp.down_proj.weight", "mlp.down_proj.weight_scale"):
        changed = onnx.load(sample.path)
        (value,) = (v for v in changed.graph.initializer if v.name == name)
        raw = bytearray(value.raw_data)
        raw[0] ^= 1
        value.raw_data = bytes(raw)
        path = tmp_path / "changed.onnx"
        onnx.save(changed, path)
        build_engine(path, sample.spec, engines[1], profiles=profiles)
        assert program_digest(engines[1]) not in ("", first), name
    onnx.save(model, path)
    build_engine(path, sample.spec, engines[1], profiles=profiles)
    assert program_digest(engines[1]) == first


def test_a_digest_covers_programs_and_weights_and_not_the_numbers_of_sizes(
    make: Make, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample, engine = make("step", dtype="bf16", scheme="int8"), tmp_path / "part.engine"
    build_engine(sample.path, sample.spec, engine)
    data, digest = engine.read_bytes(), program_digest(engine)
    program = data.find(b"header {\n")

    def digest_with(at: int) -> str:
        changed = bytearray(data)
        changed[at] ^= 0x01
        engine.write_bytes(changed)
        return program_digest(engine)

    assert digest_with(program - 2000) == digest  # a size of a tensor, in the envelope
    assert digest_with(program + 2000) not in ("", digest)
    assert digest_with(len(data) - 1000) not in ("", digest)  # a weight
    assert digest_with(program - 16) == ""  # the program's name
    engine.write_bytes(data[: program + 50])
    assert program_digest(engine) == ""
    engine.write_bytes(b"vtrt" + bytes(8))
    assert program_digest(engine) == ""


def test_files_that_are_no_engine_are_refused(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample, engine = make("mlp", dtype="bf16"), tmp_path / "part.engine"
    build_engine(sample.path, sample.spec, engine)
    whole = engine.read_bytes()
    start = whole.index(b"header {\n")
    cases = {
        "empty": b"",
        "graph": sample.path.read_bytes(),
        "headless": whole[:start] + whole[-1000:],
        "cut": whole[: start + 5000],
        "unbalanced": whole[: whole.index(b"descriptors {\n") + 200] + b"\0",
        "deep": b"vtrt" + b"header {\n\ndescriptors {\n" + b"a={ " * 1000 + b"\0",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(IntegrityError):
            read_programs(tmp_path / name)
    with pytest.raises(IntegrityError):
        read_programs(tmp_path / "absent")


@pytest.mark.parametrize(
    ("attention", "cause"),
    [
        (None, "no such matrix product"),
        (
            VerifiedAttention(("a", "b", "c"), False, "", ("fp8",) * 3, 128, "why"),
            r"fp8xfp8xfp8 unfused \(why\)",
        ),
        (VerifiedAttention(("a", "b", "c"), True, "gemv_mha", ("bf16",) * 3), "bf16xbf16xbf16"),
        (VerifiedAttention(("a", "b", "c"), True, "gemm_mha", ("fp8", "fp8", "fp8")), ""),
    ],
)
def test_promised_fp8_attention(attention: VerifiedAttention | None, cause: str) -> None:
    report = VerificationReport("tensorrt-rtx", 1, 1, (), (attention,) if attention else (), ())
    if not cause:
        check_expectations(report, {"b": "fp8"})
        return
    with pytest.raises(BuildError, match=cause):
        check_expectations(report, {"b": "fp8"})
