"""``ivl-export verify``: a bundle's files, its expected precision, and the kernels that really run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle
from ..bundle.manifest import EngineFile
from ..bundle.spec import ComponentSpec, TensorSpec
from ..files.write import write_text
from ..settings import SWITCH, Setting, Table, read_settings, switch, text
from .build_tables import print_kernels
from .command import SettingsOpt, command
from .layers import json_layers, print_layers
from .options import BundleArg
from .output import check_writable, human_bytes, print_json, print_table, show
from .proofs import Here, Proofs, check_here, proof_of_file, proofs, proofs_here

MAX_ROWS = 40  # of one receipt's table

app = typer.Typer(add_completion=False)

SETTINGS: Table = {
    "device": Setting("cpu, cuda or cuda:1", "device of --backend torch; else cpu", text, default="cpu"),
    "dtype": Setting(
        "fp32, bf16 or fp16",
        "type of --backend torch; else fp32, on a GPU the bundle's 16-bit type",
        text,
    ),
    "compile": Setting(SWITCH, "run --backend torch through torch.compile", switch, default=False),
}


@app.command(cls=command(SETTINGS))
def verify(
    bundle: BundleArg,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare file sizes only, instead of hashing every file.")
    ] = False,
    contents: Annotated[
        bool, typer.Option("--contents", help="Show tensors, axes, files and every receipt too.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="List each product, convolution and attention, and how it runs.")
    ] = False,
    component: Annotated[str | None, typer.Option(help="Report this component only.")] = None,
    engine: Annotated[str | None, typer.Option(help="Report this engine only: tensorrt-rtx-sm89.")] = None,
    layer_info: Annotated[
        Path | None,
        typer.Option(help="Read TensorRT's layer JSON (trtexec --exportLayerInfo) of --component instead."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Run the components here and report what ran: torch or onnxruntime."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write all layers as one page, to sort and search.")
    ] = None,
    settings: SettingsOpt = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print manifest and receipts as JSON; with --layers: what runs."),
    ] = False,
) -> None:
    """Check that a bundle's files are intact; report the expected precision and the kernels that really run.

    The report was read from the engines when the bundle was built; --backend reads it again on this machine.
    """
    check_writable("--html", html)
    opened = Bundle.open(bundle, verify="size" if quick else "hash")
    checked = "size of every file" if quick else "sha256 of every file"
    engine_settings = read_settings(SETTINGS, settings or ())
    here = Here(backend, **engine_settings) if backend else None
    selected = layers or html is not None or any(x is not None for x in (component, engine, layer_info, here))
    verified = "verification" in opened.manifest.receipts
    reports = _reports(opened, component, engine, layer_info, here) if selected or verified else {}
    if html is not None:
        from .layers_page import page

        write_text(page(opened.manifest.model.name, opened.manifest.recipe, reports), html)
    if as_json:
        print_json(json_layers(reports) if selected else _json(opened, checked))
    else:
        if not selected:
            _overview(opened, checked)
            _engines(opened)
        print_layers(reports) if layers else _kernels(reports)
        if contents:
            _contents(opened)
        if html is not None:
            typer.echo(f"Written: {html}")
    if here is not None and here.backend == "torch":
        check_here(reports, here)


def _reports(
    bundle: Bundle, component: str | None, engine: str | None, info: Path | None, here: Here | None
) -> Proofs:
    if here is not None:
        return proofs_here(bundle, component, here)
    return proofs(bundle, component, engine) if info is None else proof_of_file(bundle, info, component)


def _json(bundle: Bundle, checked: str) -> dict[str, Any]:
    receipts = {name: bundle.receipt(name) for name in bundle.manifest.receipts}
    manifest = bundle.manifest.to_json()
    return {"bundle": str(bundle.root), "verified": checked, "manifest": manifest, "receipts": receipts}


def _contents(bundle: Bundle) -> None:
    _components(bundle)
    _files(bundle)
    for name in bundle.manifest.receipts:
        receipt = bundle.receipt(name)
        if name != "verification":
            _receipt(name, _seconds(receipt) if name == "build" else receipt)


def _overview(bundle: Bundle, checked: str) -> None:
    m = bundle.manifest
    recipe = m.recipe if m.recipe == m.compute_dtype else f"{m.recipe} ({m.compute_dtype} elsewhere)"
    calibration: object = None
    if m.calibration is not None:
        kind = "synthetic" if m.calibration.synthetic else "real"
        skipped = f", {m.calibration.skipped} skipped" if m.calibration.skipped else ""
        skipped += ", fewer than recommended" if m.calibration.small else ""
        skipped += f", {m.calibration.algorithm}" if m.calibration.algorithm else ""
        calibration = f"{m.calibration.samples} {kind} samples{skipped}, {m.calibration.sha256[:12]}"
    print_table(
        f"Bundle {bundle.root}",
        ("", ""),
        [
            ("model", f"{m.model.name}, {m.model.parameters:,} parameters"),
            ("source", m.model.source),
            ("recipe", recipe),
            ("calibration", calibration),
            ("size", human_bytes(sum(f.size for f in m.files.values()))),
            ("checked", f"{checked}: intact"),
            ("tools", [f"{name} {version}" for name, version in sorted(m.tools.items())]),
        ],
    )


def _components(bundle: Bundle) -> None:
    rows: list[tuple[object, ...]] = []
    for name, component in bundle.manifest.components.items():
        spec = component.spec
        tensors = [("in", t) for t in spec.inputs] + [("out", t) for t in spec.outputs]
        for i, (way, members) in enumerate(_fold(tensors)):
            rows.append((name if i == 0 else "", way, *_tensor(members)))
        rows.append(("", "axes", _axes(spec), "", ""))
    print_table("Components", ("component", "", "tensor", "dtype", "shape"), rows)


def _fold(tensors: list[tuple[str, TensorSpec]]) -> list[tuple[str, list[TensorSpec]]]:
    """``key.0`` .. ``key.31`` of one shape as one entry."""
    groups: dict[tuple[object, ...], list[TensorSpec]] = {}
    for way, t in tensors:
        stem, dot, number = t.name.rpartition(".")
        series = stem if dot and number.isdigit() else t.name
        groups.setdefault((way, series, t.dtype, t.shape), []).append(t)
    return [(str(key[0]), members) for key, members in groups.items()]


def _tensor(members: list[TensorSpec]) -> tuple[str, str, str]:
    first, last = members[0], members[-1]
    name = first.name if first is last else f"{first.name} .. {last.name.rpartition('.')[2]}"
    return name, first.dtype, f"[{', '.join(map(str, first.shape))}]"


def _axes(spec: ComponentSpec) -> str:
    return ", ".join(f"{a.name} {a.min}..{a.max} (tuned for {a.opt})" for a in spec.axes)


def _engines(bundle: Bundle) -> None:
    m = bundle.manifest
    if m.engines:
        columns = ("component", "backend", "target", "built with", "size", "program", "file")
        print_table(
            "Engines",
            columns,
            [
                (
                    _part(bundle, e),
                    e.backend,
                    e.target,
                    e.release,
                    human_bytes(m.files[e.file].size),
                    _program(bundle, e)[:12],
                    e.file,
                )
                for e in m.engines
            ],
        )


def _program(bundle: Bundle, engine: EngineFile) -> str:
    """Digest of what an engine computes, as its receipt has it: builds that differ in bytes share it."""
    if "verification" not in bundle.manifest.receipts:
        return ""
    receipt: Any = bundle.receipt("verification")
    try:
        return str(receipt[f"{engine.backend}-{engine.target}"][engine.component]["program"])
    except (KeyError, TypeError):
        return ""


def _part(bundle: Bundle, engine: EngineFile) -> str:
    parts = len(bundle.manifest.components[engine.component].parts)
    return f"{engine.component}, part {engine.part + 1} of {parts}" if parts else engine.component


def _files(bundle: Bundle) -> None:
    rows = [
        (path, human_bytes(entry.size), entry.sha256[:12]) for path, entry in bundle.manifest.files.items()
    ]
    print_table("Files", ("file", "size", "sha256"), rows)


def _kernels(reports: Proofs) -> None:
    """Counts of each engine's products and attentions; ``--layers`` lists them."""
    if not reports:
        typer.echo("No verification receipt: --backend onnxruntime or torch reads here what runs.")
        return
    print_kernels(
        {
            engine: {
                part: {
                    "promised": len(proof.promised),
                    "precisions": proof.report.precisions,
                    "fused_attention": proof.report.fused_attention,
                    "attention": len(proof.report.attention),
                    "fallbacks": len(proof.report.fallbacks),
                }
                for part, proof in parts.items()
            }
            for engine, parts in reports.items()
        }
    )


def _seconds(receipt: Any) -> Any:
    """The seconds of each step of a build; the rest of that receipt is for the next build."""
    if not isinstance(receipt, dict) or not all(isinstance(step, dict) for step in receipt.values()):
        return receipt
    return {name: {"seconds": step.get("seconds")} for name, step in receipt.items()}


def _receipt(name: str, receipt: Any) -> None:
    """Any receipt as tables: its records (objects with plain values), those of equal columns together."""
    tables: dict[tuple[str, ...], list[tuple[str, dict[str, object]]]] = {}
    for path, record in _records("", receipt):
        tables.setdefault(tuple(record), []).append((path, record))
    for columns, rows in tables.items():
        if len(rows) == 1:
            path, record = rows[0]
            title = f"Receipt: {name}{f', {path}' if path else ''}"
            print_table(title, ("", ""), [(key, show(value)) for key, value in record.items()])
            continue
        shown = [(path, *record.values()) for path, record in rows[:MAX_ROWS]]
        if len(rows) > MAX_ROWS:
            shown.append((f"… {len(rows) - MAX_ROWS} more with --json", *[""] * len(columns)))
        print_table(f"Receipt: {name}", ("", *columns), shown)


def _records(path: str, value: Any) -> Iterator[tuple[str, dict[str, object]]]:
    """Records below ``value`` with their paths. Long lists inside a record are only counted."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value, 1)}
    if not isinstance(value, dict):
        yield path, {"value": value}
        return
    if any(_plain(v) for v in value.values()):
        yield path, {k: _cell(v) for k, v in value.items() if not _deep(v)}
        value = {k: v for k, v in value.items() if _deep(v)}
    for key, inner in value.items():
        yield from _records(f"{path} {key}".strip(), inner)


def _plain(value: Any) -> bool:
    return not isinstance(value, dict | list) or (isinstance(value, list) and not any(map(_nested, value)))


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _deep(value: Any) -> bool:
    """Whether ``value`` is an object that does not fit a cell."""
    return isinstance(value, dict) and any(map(_nested, value.values()))


def _cell(value: Any) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(inner)}" for key, inner in value.items())
    if isinstance(value, list) and any(map(_nested, value)):
        return f"{len(value)} entries"
    return value
