"""A fake of tensorrt and tensorrt_rtx that records calls: their real names and signatures, no behaviour.

It is made from ``surfaces/*.json``, read from the real bindings (``tests/tools/tensorrt_surface.py``): a name
the release does not have is an AttributeError, an argument its signature does not take a TypeError, and what
is read-only cannot be set. A call gives back an object of the class that its signature says, True for a bool,
and 0 for an int, unless the test gives it a behaviour. It says nothing about what TensorRT does.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SURFACES = {path.stem: path for path in sorted((Path(__file__).parent / "surfaces").glob("*.json"))}
TRT10, TRT11, RTX = sorted(SURFACES)
PLAIN: dict[str, Any] = {"bool": True, "int": 0, "float": 0.0, "str": "", "None": None}
Behaviour = Callable[..., Any]


class Fake:
    """The module of one release. ``calls`` are ``("Class.name", arguments)`` in order, sets included.

    ``behaviours`` maps ``Class.name`` to its replacement, called, with the object and the arguments; of a
    property it is called with the object alone.
    """

    def __init__(self, surface: str, behaviours: dict[str, Behaviour] | None = None) -> None:
        data = json.loads(SURFACES[surface].read_text())
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.behaviours = dict(behaviours or {})
        self.module: Any = SimpleNamespace(__name__=data["module"], __version__=data["release"])
        for name, members in data["enums"].items():
            values = {m: i for i, m in enumerate(members)}
            setattr(self.module, name, enum.IntEnum(name, values) if values else None)
        for name, attributes in data["classes"].items():
            setattr(self.module, name, self._class(name, attributes))

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """Arguments of the calls of ``names``."""
        return [args for name, args in self.calls if name in names]

    def _class(self, name: str, attributes: dict[str, str]) -> type:
        calls: dict[str, Any] = {"__slots__": ("__dict__",)}
        for attribute, text in attributes.items():
            if attribute == "__init__" and not text:
                continue  # only the library makes these
            if text.startswith("("):
                calls[attribute] = self._method(name, attribute, text.split("\n"))
            elif text:
                calls[attribute] = self._property(name, attribute, text)
            else:
                calls[attribute] = f"{name}.{attribute}"
        return type(name, (), calls)

    def _method(self, cls: str, name: str, signatures: list[str]) -> Behaviour:
        parsed = [_signature(text) for text in signatures]
        label = f"{cls}.{name}"

        def call(self_: Any, *args: Any, **kwargs: Any) -> Any:
            fitting = [s for s in parsed if s.takes(args, kwargs)]
            if not fitting:
                raise TypeError(f"{label}{args}{kwargs} fits none of {signatures}")
            self.calls.append((label, (*args, *kwargs.values())))
            if label in self.behaviours:
                return self.behaviours[label](self_, *args, **kwargs)
            return self._made(fitting[0].returns)

        return call

    def _property(self, cls: str, name: str, told: str) -> property:
        kind, writable = told.removesuffix(" writable"), told.endswith(" writable")
        label = f"{cls}.{name}"

        def read(self_: Any) -> Any:
            if label in self.behaviours:
                return self.behaviours[label](self_)
            return self_.__dict__.get(name, self._made(kind))

        def write(self_: Any, value: Any) -> None:
            self.calls.append((label, (value,)))
            self_.__dict__[name] = value

        return property(read, write if writable else None)

    def _made(self, kind: str) -> Any:
        cls = getattr(self.module, kind, None)
        if isinstance(cls, type):
            return object.__new__(cls) if not issubclass(cls, enum.Enum) else next(iter(cls))
        return PLAIN.get(kind)


class _Signature(SimpleNamespace):
    names: list[str]
    required: int
    returns: str

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        inputs = [*self.names[: len(args)], *kwargs]
        fits = len(args) + len(kwargs) <= len(self.names) and set(kwargs) <= set(self.names[len(args) :])
        return fits and set(self.names[: self.required]) <= set(inputs)


def _signature(text: str) -> _Signature:
    """Names of the arguments but self, how many have no default, and the class it returns."""
    inside, _, returns = text.rpartition(") -> ")
    depth, parts, part = 0, [], ""
    for char in inside.removeprefix("("):
        depth += (char in "[(<{") - (char in "])>}")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    parts = [p.strip() for p in [*parts, part] if p.strip()][1:]
    names = [re.split(r"[:=]", p)[0].strip() for p in parts]
    return _Signature(names=names, required=sum("=" not in p for p in parts), returns=returns.strip())
