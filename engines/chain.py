"""The engines of a split component, run one after another as one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, cast

from ..arrays import Array
from ..bundle.spec import ComponentSpec
from .base import Engine, run_from_host
from .device import HOST, B, Buffer, deliver

if TYPE_CHECKING:
    import torch


class ChainedEngine:
    """The parts of a component in order. See :class:`~ivl_export.engines.base.Engine`.

    Args:
        spec: the component's contract.
        parts: opened engines: each takes inputs of the component and outputs of engines before it. They are
            closed with the chain.
    """

    def __init__(self, spec: ComponentSpec, parts: Sequence[Engine]) -> None:
        self.spec = spec
        self._parts = tuple(parts)

    @property
    def device(self) -> str:
        """Where its parts compute."""
        return self._parts[0].device

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once, as many parts as ``outputs`` need; see :meth:`~ivl_export.engines.base.Engine.run`.

        Tensors between parts on a GPU stay there.
        """
        self.spec.check(inputs)
        if self.device != HOST:
            return run_from_host(self, inputs, outputs)
        return self._chain(inputs, outputs, lambda part, feeds, names: part.run(feeds, names))

    def run_tensors(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Sequence[str] | None = None,
        *,
        out: Mapping[str, Buffer] | None = None,
        stream: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """See :meth:`~ivl_export.engines.base.Engine.run_tensors`."""
        self.spec.check(inputs)

        def run(part: Engine, feeds: dict[str, Buffer], names: list[str]) -> Mapping[str, Buffer]:
            here = {name: buffer for name, buffer in (out or {}).items() if name in names}
            return part.run_tensors(feeds, names, out=here, stream=stream)

        values = self._chain(dict(inputs), outputs, run)
        return deliver(cast("dict[str, torch.Tensor]", values), out)

    def _chain(
        self,
        inputs: Mapping[str, B],
        outputs: Sequence[str] | None,
        run: Callable[[Engine, dict[str, B], list[str]], Mapping[str, B]],
    ) -> dict[str, B]:
        names = self.spec.select(outputs)
        values, left = dict(inputs), set(names)
        for k, part in enumerate(self._parts):
            gives = [t.name for t in part.spec.outputs]
            left.difference_update(gives)
            read_later = (
                {t.name for later in self._parts[k + 1 :] for t in later.spec.inputs} if left else set()
            )
            feeds = {t.name: values[t.name] for t in part.spec.inputs}
            values.update(run(part, feeds, [name for name in gives if name in read_later or name in names]))
            if not left:
                break
        return {name: values[name] for name in names}

    @property
    def parts(self) -> tuple[Engine, ...]:
        """The engines in the order they run."""
        return self._parts

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
