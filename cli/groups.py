"""Verbs with commands of their own, one of which may be left out: ``train`` is short for ``train run``."""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperGroup


class DefaultGroup(TyperGroup):
    """A group of commands; a line that names none of them calls :attr:`default`."""

    default: ClassVar[str]

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with the default command put in."""
        return super().parse_args(ctx, self._named(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with the default command put in."""
        return super().resolve_command(ctx, self._named(args))

    def _named(self, args: list[str]) -> list[str]:
        return args if args and args[0] in self.commands else [self.default, *args]


def group_with_default(name: str) -> type[DefaultGroup]:
    """A :class:`DefaultGroup` whose default command is ``name``."""
    return type("Group", (DefaultGroup,), {"default": name})
