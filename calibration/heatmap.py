"""A heat map of losses: one row a layer, one column a scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import CapabilityError
from ..files.write import atomic
from .sensitivity import Sensitivity

_DPI = 150


def draw(found: Sensitivity, path: Path) -> None:
    """Write the SQNR of every layer in every scheme, of the component that suffers most, as a PNG.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError(
            "A heat map needs matplotlib.", str(error), "pip install 'ivl-export[plots]'"
        ) from error
    worst = found.worst()
    layers = list(dict.fromkeys(layer for layer, _ in worst))
    schemes = list(dict.fromkeys(scheme for _, scheme in worst))
    table = np.full((len(layers), len(schemes)), np.nan)
    for (layer, scheme), loss in worst.items():
        table[layers.index(layer), schemes.index(scheme)] = np.nan if loss.sqnr_db is None else loss.sqnr_db
    figure = Figure(figsize=(3 + 1.1 * len(schemes), 1.5 + 0.2 * len(layers)), layout="constrained")
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
    FigureCanvasAgg(figure)
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI)
