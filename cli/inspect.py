"""``ivl-export inspect``: what a bundle holds and promises. Reads manifest and receipts, runs no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle
from ..specs import ComponentSpec, TensorSpec
from .output import human_bytes, print_json, print_table, show

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file (reads all of it).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a bundle holds, what it promises, and whether its files are intact."""
    opened = Bundle.open(bundle, verify="hash" if verify else "size")
    receipts = {name: opened.receipt(name) for name in opened.manifest.receipts}
    checked = "sha256 of every file" if verify else "size of every file"
    if as_json:
        data = opened.manifest.to_json()
        print_json({"bundle": str(bundle), "verified": checked, "manifest": data, "receipts": receipts})
        return
    _overview(opened, checked)
    _components(opened)
    _engines(opened)
    _files(opened)
    for name, receipt in receipts.items():
        _receipt(name, receipt)


def _overview(bundle: Bundle, checked: str) -> None:
    m = bundle.manifest
    calibration: object = None
    if m.calibration is not None:
        kind = "synthetic" if m.calibration.synthetic else "real"
        skipped = f", {m.calibration.skipped} skipped" if m.calibration.skipped else ""
        calibration = f"{m.calibration.samples} {kind} samples{skipped}, {m.calibration.sha256[:12]}"
    print_table(
        f"Bundle {bundle.root}",
        ("", ""),
        [
            ("model", f"{m.model.name}, {m.model.parameters:,} parameters"),
            ("source", m.model.source),
            ("precision", f"{m.precision} ({m.compute_dtype} elsewhere)"),
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
        columns = ("component", "backend", "target", "built with", "size", "file")
        print_table(
            "Engines",
            columns,
            [
                (e.component, e.backend, e.target, e.release, human_bytes(m.files[e.file].size), e.file)
                for e in m.engines
            ],
        )


def _files(bundle: Bundle) -> None:
    rows = [
        (path, human_bytes(entry.size), entry.sha256[:12]) for path, entry in bundle.manifest.files.items()
    ]
    print_table("Files", ("file", "size", "sha256"), rows)


def _receipt(name: str, receipt: Any) -> None:
    """Any receipt as tables: scalars together, each object of objects or list of objects as one table."""
    if not isinstance(receipt, dict):
        receipt = {"": receipt}
    scalars = [(k, show(v)) for k, v in receipt.items() if not isinstance(v, dict) and not _records(v)]
    if scalars:
        print_table(f"Receipt: {name}", ("", ""), scalars)
    for key, value in receipt.items():
        records = _records(value)
        if isinstance(value, dict) and not records:
            print_table(f"Receipt: {name}, {key}", ("", ""), [(k, show(v)) for k, v in value.items()])
        elif records:
            columns = list(dict.fromkeys(k for record in records for k in record))
            print_table(
                f"Receipt: {name}, {key}", columns, [[r.get(column) for column in columns] for r in records]
            )


def _records(value: Any) -> list[dict[str, Any]]:
    """``value`` as rows of a table if it is an object of objects or a list of objects; empty if not."""
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        return [{"": key, **inner} for key, inner in value.items()]
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return value
    return []
