"""``ivl-export verify --layers``: each product, convolution and attention of a bundle, and how it runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..verify.report import VerificationReport, VerifiedAttention, VerifiedProduct
from .output import human_bytes, print_table
from .proofs import Proof, Proofs

_BLOCK = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Layer:
    """One line; without a stored weight ``weight_bits`` is None and ``shape`` is empty."""

    kind: str
    name: str
    promised: str
    runs: str
    fused: str
    shape: tuple[int, ...]
    weight_bytes: int
    weight_bits: float | None
    kernel: str
    cause: str


def layers(proof: Proof) -> Iterator[Layer]:
    """Convolutions, matrix products, attentions, and casts left over."""
    for product in proof.report.products:
        yield _product(product, proof.promised)
    for block in proof.report.attention:
        yield _attention(block, proof.promised)
    for name in proof.report.casts:
        yield Layer("cast", name, "", "", "", (), 0, None, "", "a separate cast between float types")


def _product(product: VerifiedProduct, promised: Mapping[str, str]) -> Layer:
    keys = (product.node, product.weight, product.weight.removesuffix(".weight"))
    others = [name for name in product.merged if name != product.node]
    together = [f"merged with {', '.join(map(_short, others))}"] if others else []
    together += [f"does {', '.join(map(_short, product.fused))}"] if product.fused else []
    return Layer(
        "convolution" if product.op == "Conv" else "product",
        product.node,
        next((promised[key] for key in keys if key in promised), ""),
        product.precision,
        "; ".join(together),
        product.shape,
        product.weight_bytes,
        product.weight_bits,
        product.kernel,
        product.cause,
    )


def _attention(block: VerifiedAttention, promised: Mapping[str, str]) -> Layer:
    return Layer(
        "attention",
        block.nodes[0],
        next((promised[node] for node in block.nodes if node in promised), ""),
        "x".join(block.types[:3]),
        f"one kernel, head size {block.head_size}" if block.fused else "not fused",
        (),
        0,
        None,
        block.kernel,
        block.cause,
    )


def _short(name: str) -> str:
    return name.rpartition("/" if "/" in name else ".")[2]


def summary(report: VerificationReport) -> dict[str, str]:
    """The figures of an engine at a glance: name -> figure."""
    weights = human_bytes(report.weight_bytes) if report.weight_bytes else "unknown"
    everything = f"{human_bytes(report.constant_bytes)} of constants" if report.constant_bytes else ""
    file = f"a file of {human_bytes(report.file_bytes)}" if report.file_bytes else ""
    within = ", ".join(part for part in (everything, file) if part)
    return {
        "products": ", ".join(f"{n} {kind or 'nowhere'}" for kind, n in report.precisions.items()) or "none",
        "convolutions": ", ".join(c.precision or "nowhere" for c in report.convolutions) or "none",
        "attention": f"{report.fused_attention} of {len(report.attention)} fused",
        "fallbacks": str(len(report.fallbacks) or "none"),
        "casts left": str(len(report.casts) or "none"),
        "weights stored": f"{weights} in {within}" if within else weights,
    }


def print_layers(reports: Proofs) -> None:
    """A summary and a table for each engine and component."""
    for engine, parts in reports.items():
        for component, proof in parts.items():
            about = summary(proof.report)
            print_table(f"{engine}, {component}", ("", ""), list(about.items()))
            print_table(
                "Layers, those of equal blocks as one (all with --json or --html)",
                ("layer", "count", "promised", "runs", "fused", "weight", "stored each", "bits", "why"),
                [
                    (
                        layer.name, count, layer.promised or None, layer.runs or None, layer.fused or None,
                        "x".join(map(str, layer.shape)) or None,
                        human_bytes(layer.weight_bytes) if layer.weight_bytes else None,
                        layer.weight_bits, layer.cause or None,
                    )
                    for layer, count in _folded(layers(proof)).items()
                ],
            )  # fmt: skip


def _folded(layers: Iterable[Layer]) -> dict[Layer, int]:
    """Layers that differ in their block only as one, ``layers.*``, with their number."""
    return dict(Counter(replace(layer, name=_BLOCK.sub(".*", layer.name), kernel="") for layer in layers))


def json_layers(reports: Proofs) -> dict[str, Any]:
    """Plain data: engine -> component -> the report with its promises."""
    return {
        engine: {part: {"promised": dict(p.promised), **p.report.to_json()} for part, p in parts.items()}
        for engine, parts in reports.items()
    }
