"""Sources of the reports of ``ivl-export verify``: a receipt, a vendor's file, or a run on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..errors import IntegrityError, UsageError
from ..verify.expectations import check_expectations
from ..verify.report import VerificationReport

Proofs = dict[str, dict[str, "Proof"]]
"""Engine -> component -> report and promises."""


@dataclass(frozen=True)
class Proof:
    """The report of an engine, and the scheme that was promised for each node."""

    report: VerificationReport
    promised: Mapping[str, str]


def proofs(bundle: Bundle, component: str | None, engine: str | None) -> Proofs:
    """The proofs in the bundle's receipt, of one component or engine only if named.

    For a bundle without a receipt ONNX Runtime's kernels are read here; nothing was promised.

    Raises:
        UsageError: an unknown component or engine.
        IntegrityError: the receipt cannot be read.
    """
    if "verification" not in bundle.manifest.receipts:
        return _chosen({"onnxruntime-cpu": _read_here(bundle, component)}, component, engine)
    receipt = bundle.receipt("verification")
    try:
        reports = {
            name: {
                part: Proof(VerificationReport.from_json(proof), dict(proof["promised"]))
                for part, proof in components.items()
            }
            for name, components in receipt.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"The receipt verification.json of {bundle.root} cannot be read.", repr(error), "Build it again."
        ) from error
    return _chosen(reports, component, engine)


def proof_of_file(bundle: Bundle, info: Path, component: str | None) -> Proofs:
    """The proof of a component by TensorRT's layer information ``info``, with the bundle's promises.

    Raises:
        UsageError: no component was named.
        IntegrityError: the file is not layer information.
    """
    from ..verify.inspector import read_inspector

    if component is None:
        raise UsageError("--layer-info is of one component.", "", "Name it: --component vision.")
    base = bundle.manifest.compute_dtype
    report = read_inspector(info, bundle.graph(component, base))
    known = proofs(bundle, component, None) if "verification" in bundle.manifest.receipts else {}
    # ONNX Runtime's promises name the nodes of the fp32 graph.
    promised = next((p[component].promised for name, p in known.items() if name != "onnxruntime-cpu"), {})
    return {f"{report.backend} ({info.name})": {component: Proof(report, promised)}}


@dataclass(frozen=True)
class Here:
    """A run on this machine: the backend, and for ``torch`` the arguments of
    :func:`~ivl_export.engines.torch.engine.open_torch`."""

    backend: str
    device: str = "cpu"
    dtype: str | None = None
    compile: bool = False


def proofs_here(bundle: Bundle, component: str | None, here: Here) -> Proofs:
    """Reports of a run of the bundle on this machine, as ``here`` says.

    Raises:
        UsageError: a backend that cannot be read here, or an unknown component.
        CapabilityError: the backend is not installed, or lacks the device.
    """
    if here.backend == "onnxruntime":
        return _chosen({"onnxruntime-cpu": _read_here(bundle, component)}, component, None)
    if here.backend != "torch":
        raise UsageError(
            f"--backend cannot read what {here.backend} runs.",
            "Engines of TensorRT and TensorRT-RTX are read from their files, into the bundle's receipt; "
            "torch-tensorrt names layers after its internal nodes.",
            "Give --backend torch or onnxruntime, --engine of the receipt, or --layer-info FILE.",
        )
    name = f"torch-{here.device}{', compiled' if here.compile else ''}"
    chosen = [part for part in bundle.manifest.components if component in (None, part)]
    return _chosen({name: {part: _run_torch(bundle, part, here) for part in chosen}}, component, None)


def _run_torch(bundle: Bundle, component: str, here: Here) -> Proof:
    from ..profiles.measure.inputs import random_inputs
    from ..verify.torch import read_torch

    spec = bundle.spec(component)
    sizes = {axis.name: axis.opt for axis in spec.axes}
    sizes |= {"batch": spec.axis("batch").min}
    # Any token ids will do: the kernels depend on shapes only.
    inputs = random_inputs(spec, sizes, vocabulary=4)
    return Proof(
        *read_torch(bundle, component, inputs, device=here.device, dtype=here.dtype, compile=here.compile)
    )


def check_here(reports: Proofs, here: Here) -> None:
    """BuildError if torch runs a promised node without the kernel that it has for it on this device."""
    from ..verify.torch import enforceable

    for parts in reports.values():
        for proof in parts.values():
            check_expectations(proof.report, enforceable(proof.promised, here.device, here.dtype))


def _read_here(bundle: Bundle, component: str | None) -> dict[str, Proof]:
    from ..verify.onnxruntime import read_onnxruntime

    graphs = {
        name: part.graphs for name, part in bundle.manifest.components.items() if component in (None, name)
    }
    return {
        name: Proof(read_onnxruntime(bundle.path(files["fp32"])), {})
        for name, files in graphs.items()
        if "fp32" in files
    }


def _chosen(reports: Proofs, component: str | None, engine: str | None) -> Proofs:
    components = list(dict.fromkeys(name for parts in reports.values() for name in parts))
    for name, known, option in (
        (engine, list(reports), "--engine"),
        (component, components, "--component"),
    ):
        if name is not None and name not in known:
            raise UsageError(
                f"{name} has no verification report.", f"There are reports of {', '.join(known) or 'none'}.",
                f"Give {option} one of these.",
            )  # fmt: skip
    return {
        name: {part: p for part, p in parts.items() if component in (None, part)}
        for name, parts in reports.items()
        if engine in (None, name)
    }
