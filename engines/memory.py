"""Predicts the memory that building an engine takes.

Measured with TensorRT-RTX 1.7 on the CPU (anonymous memory; the graph's weights stay in the page cache),
streaming the engine to its file: InternViT-6B and the three QLLaMA passes at full width in FP8, two of them
in bf16 and INT8 as well, 2, 4 and 8 blocks each, and whole models in FP8. The builder holds every weight
once, and once more those that it joins: products of one input (q, k and v; gate and up) become one kernel
with one weight. The sizes of activations do not matter, for nothing is run. The prediction was off by at
most 11% at 2 blocks, 5% at 8, and 0.5% at 48.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..bundle.spec import part_starts
from ..errors import BuildError
from .onnx_graph import Graph, stored_bytes
from .products import find_products, node_name

LIBRARY_BYTES = 200 << 20
"""Memory of a build of any graph: the library, and its temporary buffers."""
BLOCK_BYTES = 12_000_000
"""Memory of a block besides its weights: kernels and their sources."""

_BLOCK = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Load:
    """Bytes of weights that a builder holds for a graph: of each block, and outside blocks."""

    blocks: tuple[int, ...]
    rest: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Load:
        """The load of weights whose bytes, joined copies included, are given by name."""
        blocks: dict[int, int] = defaultdict(int)
        rest = 0
        for name, size in sizes.items():
            if match := _BLOCK.search(name):
                blocks[int(match[1])] += size
            else:
                rest += size
        return cls(tuple(blocks[k] for k in sorted(blocks)), rest)

    @property
    def build_bytes(self) -> int:
        """The most memory that a build takes."""
        return LIBRARY_BYTES + self.rest + sum(self.blocks) + BLOCK_BYTES * len(self.blocks)

    def split(self, count: int) -> Load:
        """The largest of ``count`` parts; the weights outside the blocks are taken to be in it."""
        ends = [*part_starts(len(self.blocks), count), len(self.blocks)]
        parts = [self.blocks[a:b] for a, b in pairwise(ends)]
        return Load(max(parts, key=lambda part: sum(part) + BLOCK_BYTES * len(part)), self.rest)


def graph_load(graph: Graph) -> Load:
    """Memory of the weights of ``graph`` in a build."""
    sizes = {name: stored_bytes(kind, shape) for name, (kind, shape) in graph.initializers.items()}
    weights = {product.node: product.weight for product in find_products(graph) if product.weight}
    joined: dict[str, set[str]] = defaultdict(set)
    for node in graph.nodes:
        if weight := weights.get(node_name(node)):
            joined[node.inputs[0]].add(weight)
    for together in joined.values():
        if len(together) > 1:
            for name in together:
                sizes[name] *= 2
    return Load.of(sizes)


def check_memory(name: str, load: Load, parts: int = 1) -> None:
    """BuildError if a build of ``load`` takes more memory than is free, with the ``-O split`` that would fit.

    ``load`` is that of one of ``parts`` parts already.
    """
    free = available_memory()
    if free is None or load.build_bytes <= free:
        return
    counts = range(2, len(load.blocks) + 1)
    fits = next((n for n in counts if load.split(n).build_bytes <= free), None)
    fix = "Free some memory, or build on a machine with more."
    if fits is not None:
        fix = f"Give -O split={fits * parts}, which builds it in as many parts, or free some memory."
    raise BuildError(
        f"There is not enough memory to build the engine of {name}.",
        f"It takes {load.build_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.",
        fix,
    )


def available_memory() -> int | None:
    """Bytes of memory that can be taken without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
