"""Component modules a segment at a time: the entry before their blocks, each block, the exit.

Components of one tower run through the same blocks (InternViT; the QLLaMA layers that query, text, step and
matching passes share; a chat model's decoder). Modules stay on the meta device; a segment's weights are
there while the segment runs, and no longer, so memory follows one block and not the model. A segment
computes the same as that part of the component's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CapabilityError
from ..models.registry import Component, ModelConfig, component_module, component_names, components_of

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

Load = Callable[[str], Tensor]
"""An fp32 weight by its published key."""


def towers(config: ModelConfig) -> dict[str, tuple[Component[Any], ...]]:
    """Tower -> the components that run through its blocks, in the order they run."""
    members: dict[str, tuple[Component[Any], ...]] = {}
    for component in components_of(config):
        members[component.tower] = (*members.get(component.tower, ()), component)
    return members


def depths(config: ModelConfig) -> dict[str, int]:
    """Blocks of each tower."""
    return {tower: max(c.depth(config) for c in members) for tower, members in towers(config).items()}


def needs(component: str, config: ModelConfig) -> set[str]:
    """The other components of a model of ``config`` whose outputs ``component`` takes, directly or not."""
    by_name = {c.name: c for c in components_of(config)}
    if component not in by_name:
        return set()
    own = by_name[component]
    direct = {link.component for link in own.links(config).values()} | {own.continues}
    direct -= {component, ""}
    return direct.union(*(needs(name, config) for name in direct))


def needed(components: Iterable[str], config: ModelConfig) -> list[str]:
    """``components`` and those they take inputs from, in the order they run.

    Raises:
        CapabilityError: a component that a model of ``config`` does not have.
    """
    names, known = set(components), component_names(config, optional=True)
    unknown = sorted(names - set(known))
    if unknown:
        raise CapabilityError(
            f"{', '.join(unknown)} cannot be calibrated.", f"Known components are {', '.join(known)}."
        )
    names = names.union(*(needs(name, config) for name in names))
    return [name for name in known if name in names]


class Segment(NamedTuple):
    """One segment of a tower: its ``block``, or the entry (-1) or the exit (its depth)."""

    tower: str
    block: int
    depth: int

    @property
    def entry(self) -> bool:
        """Whether it comes before the blocks."""
        return self.block < 0

    @property
    def exit(self) -> bool:
        """Whether it comes after the blocks."""
        return self.block == self.depth


def segments(config: ModelConfig, components: Iterable[str]) -> list[Segment]:
    """All segments of the towers of ``components``, in the order they run."""
    names, blocks = set(components), depths(config)
    return [
        Segment(tower, block, blocks[tower])
        for tower, members in towers(config).items()
        if names & {member.name for member in members}
        for block in range(-1, blocks[tower] + 1)
    ]


class Modules:
    """The modules of ``components`` without weights; :meth:`filled` gives one segment its own.

    Raises (on construction):
        CapabilityError: a component that the checkpoint has no weights for.
        UsageError: no such component.
    """

    def __init__(
        self, checkpoint: Checkpoint, components: Iterable[str], load: Load | None = None, device: str = "cpu"
    ) -> None:
        self.config, self.device = checkpoint.model, device
        self.load: Load = load or (lambda key: checkpoint.load(key, torch.float32, device))
        self.components = {c.name: c for c in components_of(self.config)}
        self.by_name: dict[str, nn.Module] = {}
        for name in components:
            with torch.device("meta"):
                module = component_module(name, self.config)
            self.by_name[name] = module.requires_grad_(False)
        self._segments = {
            name: {key: self.components[name].segment(self.config, key) for key in module.state_dict()}
            for name, module in self.by_name.items()
        }

    @contextmanager
    def filled(self, segment: Segment) -> Iterator[None]:
        """The weights of ``segment`` are there inside the ``with`` block; components share them."""
        keys = {
            name: [key for key, block in blocks.items() if self._within(name, block, segment)]
            for name, blocks in self._segments.items()
            if self.components[name].tower == segment.tower
        }
        loaded: dict[str, Tensor] = {}
        try:
            for name, own in keys.items():
                for key in own:
                    if key not in loaded:
                        loaded[key] = self.load(key).to(self.device)
                    _put(self.by_name[name], key, loaded[key])
            yield
        finally:
            for name, own in keys.items():
                module = self.by_name[name]
                for key in own:
                    _put(module, key, torch.empty_like(module.get_parameter(key), device="meta"))

    def _within(self, component: str, block: int, segment: Segment) -> bool:
        """Whether a weight of ``block`` of ``component`` belongs to ``segment``; exits coincide."""
        last = self.components[component].depth(self.config)
        return (segment.exit if block == last else block == segment.block) if last else segment.entry


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
