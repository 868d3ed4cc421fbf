"""The checkpoints that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

FOLDERS = {
    "internvl-nano": "nano",
    "internvl-nano-chat": "nano_chat",
    "internvl-nano-tiles": "nano_tiles",
}
"""Name of a shipped model -> its folder next to this file."""
SHORT = {name.removeprefix("internvl-"): name for name in FOLDERS}
"""Short name -> name."""
NANO_CHAT = Path("nano-chat")


def shipped_folder(name: str) -> Path:
    """The folder of the shipped model ``name``: one of :data:`FOLDERS` or :data:`SHORT`."""
    return Path(__file__).parent / FOLDERS[SHORT.get(name, name)]


def nano_folder() -> Path:
    """The shipped internvl-nano."""
    return shipped_folder("nano")


def nano_chat_folder() -> Path:
    """The shipped internvl-nano-chat."""
    return shipped_folder("nano-chat")


def shipped_name(model: Path | str | None) -> str | None:
    """The full name of a shipped model; None is internvl-nano.

    None for a checkpoint of the user's own: a file or folder of such a name comes first.
    """
    if model is None:
        return "internvl-nano"
    name = SHORT.get(str(model), str(model))
    return name if name in FOLDERS and not Path(model).exists() else None


def checkpoint_path(model: Path | str | None) -> Path:
    """The checkpoint of ``model``: a path, a shipped model's name, or None for internvl-nano."""
    name = shipped_name(model)
    return Path(str(model)) if name is None else shipped_folder(name)


def no_checkpoint(path: Path, *others: str) -> CheckpointError:
    """The error for a ``path`` that does not exist; ``others`` are names that would have done as well."""
    return CheckpointError(
        f"No checkpoint at {path}.",
        "There is no such file or folder.",
        f"Check the path given as --model, or name a shipped model: {', '.join((*SHORT, *others))}.",
    )
