"""``torch.compile`` of a component, a block at a time.

All blocks of a tower have the same code; compiled by themselves they share one compilation, which takes
seconds where the whole tower at once takes minutes.
"""

from __future__ import annotations

from torch import nn

from ...models.qllama import DecoderLayer
from ...models.vit import Block


def compile_blocks(module: nn.Module, mode: str | None = None, *, dynamic: bool | None = None) -> int:
    """Compile the blocks of ``module`` in place; they run through the compiled code from the first call on.

    Args:
        module: a component.
        mode: ``torch.compile``'s (``max-autotune``, ...).
        dynamic: as ``torch.compile``'s: None compiles again, for all sizes, when a size changes.

    Returns:
        How many blocks there are.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block | DecoderLayer)]
    for block in blocks:
        block.compile(fullgraph=True, mode=mode, dynamic=dynamic)
    return len(blocks)
