"""The curve of a fine-tuning run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CapabilityError
from ..files.write import atomic

SHOWN = (("caption", "en"), ("InternVL-G", "classify"), ("InternVL-G", "text_to_image"))
"""Tasks whose accuracy is drawn over the steps."""


def plot(receipt: dict[str, Any], path: Path) -> None:
    """Draw the losses of a receipt of :mod:`.qat`, and its accuracy where it was measured, into a PNG.

    Raises:
        CapabilityError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CapabilityError(
            "The curve cannot be drawn.", str(error), "pip install 'ivl-export[plots]'"
        ) from error
    scores = receipt.get("scores")
    figure = Figure(figsize=(9 if scores else 5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    losses = receipt["losses"]
    for name in losses[0]:
        if name != "grad_norm":
            axes[0].plot(
                range(1, len(losses) + 1), [max(step[name], 1e-9) for step in losses], label=name, lw=1
            )
    axes[0].set(xlabel="step", ylabel="loss", yscale="log", title=f"{receipt['recipe']}: losses")
    axes[0].legend(frameon=False)
    if scores:
        last = len(losses)
        points = [
            (0, scores["ptq"]),
            *((point["step"], point["scores"]) for point in receipt["curve"]),
            (last, scores["qat"]),
        ]
        for group, task in SHOWN:
            values = [100 * found[group][task]["accuracy"] for _, found in points]
            line = axes[1].plot(
                [step for step, _ in points], values, "o-", ms=3, lw=1, label=f"{group} {task}"
            )
            whole = 100 * scores["fp32"][group][task]["accuracy"]
            axes[1].axhline(whole, color=line[0].get_color(), ls=":", lw=1)
        axes[1].set(xlabel="step", ylabel="accuracy, %", title="held-out scenes (dotted: fp32)")
        axes[1].legend(frameon=False, loc="lower right")
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
