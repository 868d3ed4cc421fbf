"""``ivl-export inspect --layers``: each product, convolution and attention of a bundle, and how it runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from ..bundle import Bundle
from ..engines.proof import AttentionProof, KernelReport, ProductProof
from ..errors import IntegrityError, UsageError
from .output import human_bytes, print_json, print_table, show

_BLOCK = re.compile(r"\.\d+(?=\.|$)")
Proofs = dict[str, dict[str, "Proof"]]
"""Engine -> component -> its proof."""


@dataclass(frozen=True)
class Proof:
    """What an engine does, and what was promised of it (node -> scheme)."""

    report: KernelReport
    promised: Mapping[str, str]


@dataclass(frozen=True)
class Layer:
    """One line: ``weight_bits`` is None and ``shape`` empty where there is no stored weight."""

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


def proofs(bundle: Bundle, component: str | None, engine: str | None) -> Proofs:
    """The proofs in the bundle's receipt, of one component or engine only if named.

    A bundle without one promised nothing: what ONNX Runtime makes of its graphs is read here.

    Raises:
        UsageError: there is no such component or engine.
        IntegrityError: the receipt is not one.
    """
    if "kernels" not in bundle.manifest.receipts:
        return _chosen({"onnxruntime-cpu": _read_here(bundle, component)}, component, engine)
    receipt = bundle.receipt("kernels")
    try:
        found = {
            name: {
                part: Proof(KernelReport.from_json(proof), dict(proof["promised"]))
                for part, proof in components.items()
            }
            for name, components in receipt.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"The receipt kernels.json of {bundle.root} cannot be read.", repr(error), "Build it again."
        ) from error
    return _chosen(found, component, engine)


def proof_of_file(bundle: Bundle, info: Path, component: str | None) -> Proofs:
    """The proof of a component by TensorRT's layer information ``info``, with the bundle's promises.

    Raises:
        UsageError: no component was named.
        IntegrityError: the file is no layer information.
    """
    from ..engines.proof_inspector import proof_from_inspector

    if component is None:
        raise UsageError("--layer-info is of one component.", "", "Name it: --component vision.")
    base = bundle.manifest.compute_dtype
    report = proof_from_inspector(info, bundle.graph(component, base))
    known = proofs(bundle, component, None) if "kernels" in bundle.manifest.receipts else {}
    # ONNX Runtime's promises are of its own graph.
    promised = next((p[component].promised for name, p in known.items() if name != "onnxruntime-cpu"), {})
    return {f"{report.backend} ({info.name})": {component: Proof(report, promised)}}


def _read_here(bundle: Bundle, component: str | None) -> dict[str, Proof]:
    from ..engines.proof_onnxruntime import proof_from_onnxruntime

    graphs = {
        name: part.graphs for name, part in bundle.manifest.components.items() if component in (None, name)
    }
    return {
        name: Proof(proof_from_onnxruntime(bundle.path(files["fp32"])), {})
        for name, files in graphs.items()
        if "fp32" in files
    }


def _chosen(found: Proofs, component: str | None, engine: str | None) -> Proofs:
    components = list(dict.fromkeys(name for parts in found.values() for name in parts))
    for wanted, known, option in ((engine, list(found), "--engine"), (component, components, "--component")):
        if wanted is not None and wanted not in known:
            raise UsageError(
                f"There is no proof of {wanted}.", f"There are {', '.join(known) or 'none'}.",
                f"Give {option} one of these.",
            )  # fmt: skip
    return {
        name: {part: p for part, p in parts.items() if component in (None, part)}
        for name, parts in found.items()
        if engine in (None, name)
    }


def layers(proof: Proof) -> Iterator[Layer]:
    """Convolutions, matrix products, attentions, and casts left over."""
    for product in proof.report.products:
        yield _product(product, proof.promised)
    for block in proof.report.attention:
        yield _attention(block, proof.promised)
    for name in proof.report.casts:
        yield Layer("cast", name, "", "", "", (), 0, None, "", "stands alone between float types")


def _product(product: ProductProof, promised: Mapping[str, str]) -> Layer:
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


def _attention(block: AttentionProof, promised: Mapping[str, str]) -> Layer:
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


def summary(report: KernelReport) -> dict[str, str]:
    """What to know of an engine at a glance: word -> figure."""
    kept = human_bytes(report.weight_bytes) if report.weight_bytes else "not told"
    everything = f"{human_bytes(report.constant_bytes)} of constants" if report.constant_bytes else ""
    file = f"a file of {human_bytes(report.file_bytes)}" if report.file_bytes else ""
    within = ", ".join(part for part in (everything, file) if part)
    return {
        "products": ", ".join(f"{n} {kind or 'nowhere'}" for kind, n in report.precisions.items()) or "none",
        "convolutions": ", ".join(c.precision or "nowhere" for c in report.convolutions) or "none",
        "attention": f"{report.fused_attention} of {len(report.attention)} fused",
        "fallbacks": str(len(report.fallbacks) or "none"),
        "casts left": str(len(report.casts) or "none"),
        "weights stored": f"{kept} in {within}" if within else kept,
    }


def print_layers(found: Proofs) -> None:
    """A summary and a table for each engine and component."""
    for engine, parts in found.items():
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


def _folded(found: Iterable[Layer]) -> dict[Layer, int]:
    """Layers that differ in their block only as one, ``layers.*``, with their number."""
    return dict(Counter(replace(layer, name=_BLOCK.sub(".*", layer.name), kernel="") for layer in found))


def json_layers(found: Proofs) -> dict[str, Any]:
    """Plain data: engine -> component -> the report with its promises."""
    return {
        engine: {part: {"promised": dict(p.promised), **p.report.to_json()} for part, p in parts.items()}
        for engine, parts in found.items()
    }


def run(
    bundle: Bundle,
    component: str | None,
    engine: str | None,
    info: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """What ``inspect --layers`` does."""
    found = proofs(bundle, component, engine) if info is None else proof_of_file(bundle, info, component)
    if html is not None:
        from .layers_page import write_page

        write_page(bundle.manifest.model.name, bundle.manifest.precision, found, html)
    if as_json:
        print_json(json_layers(found))
    elif html is None:
        print_layers(found)
    else:
        typer.echo(f"{sum(len(p) for p in found.values())} proofs on one page: {show(html)}")
