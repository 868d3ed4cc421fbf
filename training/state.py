"""Where a run stands, kept on disk: one file that replaces the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..files.write import atomic
from . import distributed as dist

STATE = "state.pt"


def read_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What :func:`save_state` left in ``folder``; None if nothing is there.

    Raises:
        InputError: it is the state of a run of another ``identity``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE).exists():
        return None
    state: dict[str, Any] = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    if state["identity"] != identity:
        raise InputError(
            f"{folder} holds another run.",
            "Its model, data or settings differ from what is asked now.",
            "Use another --work-dir, or delete that one.",
        )
    return state


def save_state(
    folder: Path, model: nn.Module, chosen: list[torch.optim.Optimizer], place: dict[str, Any]
) -> None:
    """Write where a run stands; in a group every process calls it, and the first one writes.

    ``place`` says whose run it is, and how far it has come.
    """
    states = dist.whole([o.state_dict() for o in chosen])
    state = {**place, "model": dist.whole(model.state_dict()), "optimizers": states}
    if dist.rank() > 0:
        return
    with atomic(folder / STATE, exclusive=True) as partial:
        torch.save(state, partial)
