"""The checkpoints that ship with the package."""

from __future__ import annotations

from pathlib import Path

NANO_CHAT = Path("nano-chat")
"""Stands for the shipped internvl-nano-chat, unless there is something of that name."""


def nano_folder() -> Path:
    """The shipped internvl-nano."""
    return Path(__file__).parent / "nano"


def nano_chat_folder() -> Path:
    """The shipped internvl-nano-chat."""
    return nano_folder().with_name("nano_chat")


def shipped_name(model: Path | None) -> str | None:
    """The name of the shipped model that ``model`` stands for; None for a checkpoint of the user's own."""
    if model is None:
        return "internvl-nano"
    return "internvl-nano-chat" if model == NANO_CHAT and not model.exists() else None


def checkpoint_path(model: Path | None) -> Path:
    """Where the checkpoint lies that ``model`` stands for: None is internvl-nano."""
    if model is None:
        return nano_folder()
    return nano_chat_folder() if shipped_name(model) else model
