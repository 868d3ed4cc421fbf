"""The engines of a split component, run one after another as one engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from ..errors import UsageError
from ..specs import ComponentSpec
from .protocol import Array, Engine


class ChainedEngine:
    """The parts of a component in order. See :class:`~ivl_export.engines.protocol.Engine`.

    Args:
        spec: the component's contract.
        parts: opened engines: each takes inputs of the component and outputs of engines before it. They are
            closed with the chain.
    """

    def __init__(self, spec: ComponentSpec, parts: Sequence[Engine]) -> None:
        self.spec = spec
        self._parts = tuple(parts)

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once, as many parts as ``outputs`` need.

        See :meth:`~ivl_export.engines.protocol.Engine.run`.
        """
        self.spec.check(inputs)
        names = [t.name for t in self.spec.outputs]
        wanted = list(names if outputs is None else outputs)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UsageError(
                f"Component {self.spec.name} has no output {unknown[0]!r}.", f"It has {', '.join(names)}."
            )
        values, left = dict(inputs), set(wanted)
        for k, part in enumerate(self._parts):
            gives = [t.name for t in part.spec.outputs]
            left.difference_update(gives)
            behind = {t.name for later in self._parts[k + 1 :] for t in later.spec.inputs} if left else set()
            feeds = {t.name: values[t.name] for t in part.spec.inputs}
            values.update(part.run(feeds, [name for name in gives if name in behind or name in wanted]))
            if not left:
                break
        return {name: values[name] for name in wanted}

    def close(self) -> None:
        """Close all parts."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> ChainedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
