"""Plots of receipts, as PNG: the heat map of a sensitivity run, the curves of quantisation-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CapabilityError
from ..files.write import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.sensitivity import Sensitivity

SCORES = (
    ("caption", "en"), ("InternVL-G", "classify"), ("InternVL-G", "text_to_image"), ("chat", "all"),
    ("signs", "all"),
)  # fmt: skip
"""Tasks whose accuracy :func:`training_curve` shows, of those that a model has: group, task."""


def sensitivity_heatmap(sensitivity: Sensitivity, path: Path) -> None:
    """Write the SQNR of every layer (rows) in every scheme (columns), of the component that suffers most.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    worst = sensitivity.worst()
    layers = list(dict.fromkeys(layer for layer, _ in worst))
    schemes = list(dict.fromkeys(scheme for _, scheme in worst))
    table = np.full((len(layers), len(schemes)), np.nan)
    for (layer, scheme), loss in worst.items():
        table[layers.index(layer), schemes.index(scheme)] = np.nan if loss.sqnr_db is None else loss.sqnr_db
    figure = _figure("A heat map", 3 + 1.1 * len(schemes), 1.5 + 0.2 * len(layers))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(schemes)), schemes, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    middle = np.nanmean(table) if np.isfinite(table).any() else 0.0
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_title("SQNR (dB) of a block's update\nwith one layer quantised", fontsize=9)
    figure.colorbar(image, label="dB: darker loses more; white: nothing was lost")
    _save(figure, path, 150)


def training_curve(receipt: dict[str, Any], path: Path) -> None:
    """Write the losses of a training receipt, and its accuracy if it was measured.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    scores = receipt.get("scores")
    figure = _figure("The curve", 9 if scores else 5, 3.6)
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    losses = receipt["losses"]
    steps = range(1, len(losses) + 1)
    for name in losses[0]:
        if name != "grad_norm":
            axes[0].plot(steps, [max(step[name], 1e-9) for step in losses], label=name, lw=1)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log", title=f"{receipt['recipe']}: losses")
    axes[0].legend(frameon=False)
    if scores:
        points = [
            (0, scores["ptq"]),
            *((point["step"], point["scores"]) for point in receipt["curve"]),
            (len(losses), scores["qat"]),
        ]
        for group, task in (score for score in SCORES if score[0] in scores["fp32"]):
            values = [100 * at_step[group][task]["accuracy"] for _, at_step in points]
            line = axes[1].plot(
                [step for step, _ in points], values, "o-", ms=3, lw=1, label=f"{group} {task}"
            )
            whole = 100 * scores["fp32"][group][task]["accuracy"]
            axes[1].axhline(whole, color=line[0].get_color(), ls=":", lw=1)
        axes[1].set(xlabel="step", ylabel="accuracy, %", title="held-out questions (dotted: fp32)")
        axes[1].legend(frameon=False, loc="lower right")
    _save(figure, path, 120)


def _figure(what: str, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError(
            f"{what} needs matplotlib.", str(error), "pip install 'ivl-export[plots]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
