"""The tables of ``ivl-export build``: the report of a bundle, of a search, of a dry run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from .output import human_bytes, print_json, print_table, print_text

if TYPE_CHECKING:
    from ..pipeline.plan import BuildPlan
    from ..pipeline.run import StepPreview


def print_search(search: dict[str, Any]) -> None:
    """How a recipe was searched, and why each layer has its scheme."""
    print_table(
        f"Recipes measured: at most {search['budget']:g} {search['unit']} may be lost",
        (f"place of {search['places']}", "modelled us", "lost", "within"),
        [(t["place"], round(1e3 * t["ms"], 2), t["lost"], t["within"]) for t in search["tried"]],
    )
    print_table(
        f"Choices, {search['speedup']:.2f}x as fast as bf16 (modelled on {search['gpu']})",
        ("layers", "scheme", "why"),
        [(", ".join(c["layers"]), c["scheme"], c["reason"]) for c in search["choices"]],
    )


def print_report(report: dict[str, Any]) -> None:
    """The report of a finished build as tables."""
    for notice in report["notices"]:
        typer.echo(f"note: {notice}")
    if report["over_budget"]:
        typer.secho(f"warning: {report['over_budget']} (allowed)", fg="yellow")
    accuracy = [
        (component, output, round(m["cosine"], 6), m["sqnr_db"], m["samples"])
        for component, outputs in report["components"].items()
        for output, m in _worst_of_layers(outputs).items()
    ]
    print_table(
        f"{report['recipe']} against fp32, chained, held-out inputs ({report['components_in']})",
        ("component", "output", "cosine", "SQNR dB", "samples"),
        accuracy,
    )
    tokens = [
        (component, t["positions"], f"{t['same']:.1%}", f"{t['kl']:.3g}", f"{t['worst_kl']:.3g}")
        for component, outputs in report["components"].items()
        for metrics in outputs.values()
        if (t := metrics.get("tokens")) is not None
    ]
    if tokens:
        print_table(
            f"Next tokens of {report['recipe']} against fp32, the same text before them (teacher forcing)",
            ("component", "positions", "same token", "KL, mean", "KL, worst"),
            tokens,
        )
    if largest := report["largest"]:
        typer.echo(
            f"largest magnitude in fp32: {largest['value']:.4g} ({largest['component']}, {largest['place']}, "
            f"channel {largest['channel']}); {largest['type']} ends at {largest['end']:.6g}"
        )
    if report["tasks"]:
        names = list(report["tasks"])
        figures = list(report["tasks"][names[0]])
        rows = [(f, *(f"{report['tasks'][n][f]:.1%}" for n in names)) for f in figures]
        print_table("Accuracy on held-out scenes", ("task", *names), rows)
    print_kernels(report["verification"])
    for cause, places in by_cause(report["fallback_causes"]).items():
        print_text(f"note: {cause} ({places})")
    seconds = [s["seconds"] for s in report["steps"] if not s["reused"]]
    reused = len(report["steps"]) - len(seconds)
    typer.echo(f"steps: {len(seconds)} run in {sum(seconds):.1f} s, {reused} reused")
    typer.echo(f"bundle: {report['bundle']} ({human_bytes(report['bytes'])}, {report['files']} files)")


def by_cause(causes: Iterable[str]) -> dict[str, str]:
    """Lines ``engine, component: cause`` as cause -> ``engine: components``."""
    places: dict[str, dict[str, list[str]]] = {}
    for line in causes:
        place, _, cause = line.partition(": ")
        engine, _, component = place.partition(", ")
        places.setdefault(cause, {}).setdefault(engine, []).append(component)
    return {
        cause: "; ".join(f"{engine}: {', '.join(components)}" for engine, components in engines.items())
        for cause, engines in places.items()
    }


def print_kernels(kernels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Counts of a verification report as a table: engine -> component -> numbers."""
    rows = [
        (
            engine,
            component,
            proof["promised"],
            ", ".join(f"{n} {kind}" for kind, n in proof["precisions"].items()),
            f"{proof['fused_attention']} of {proof['attention']}",
            proof["fallbacks"] or "none",
        )
        for engine, components in kernels.items()
        for component, proof in components.items()
    ]
    print_table(
        "Matrix products by operand types, read from the engines",
        ("engine", "component", "promised", "products", "fused attention", "fallbacks"),
        rows,
    )


def _worst_of_layers(outputs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Outputs of every layer (``key.0``, ``key.1``, ...) as one row, that of the worst layer."""
    worst: dict[str, dict[str, Any]] = {}
    for name, metrics in outputs.items():
        stem, _, layer = name.partition(".")
        label = f"{stem}, worst layer" if layer else name
        # No SQNR means bit-equal.
        if label not in worst or (metrics["sqnr_db"] or 1e9) < (worst[label]["sqnr_db"] or 1e9):
            worst[label] = metrics
    return worst


def print_dry_run(as_json: bool, previews: list[StepPreview], plan: BuildPlan) -> None:
    """The steps that a build would run, and the schemes of its layers."""
    schemes: dict[str, int] = {}
    for scheme in plan.layers.schemes.values():
        schemes[scheme] = schemes.get(scheme, 0) + 1
    if as_json:
        steps = [
            {
                "step": p.step,
                "action": "reuse" if p.known else "run",
                "writes_bytes": p.writes,
                "memory_bytes": p.memory,
            }
            for p in previews
        ]
        print_json({"steps": steps, "layers": schemes, "notices": list(plan.notices)})
        return
    for notice in plan.notices:
        typer.echo(f"note: {notice}")
    rows = [
        (p.step, "reuse" if p.known else "run", *(_size(p, size) for size in (p.writes, p.memory)))
        for p in previews
    ]
    print_table(f"Would build {plan.config.out}", ("step", "action", "writes about", "memory about"), rows)
    print_table("Linear layers", ("scheme", "layers"), list(schemes.items()))


def _size(preview: StepPreview, size: int) -> str:
    return human_bytes(size) if size and not preview.known else ""
