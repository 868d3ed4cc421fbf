"""AWQ (arXiv 2306.00978): weights that meet large inputs are scaled up before they are rounded to INT4.

For each group of layers that share an input, factors ``mean |x| ** alpha`` are tried (section 3.2), and the
factors chosen that change outputs least: of the group's MLP, or else its own. ``alpha`` 0 means no
scaling. Factors are powers of two, as SmoothQuant's here, so folding changes no result. One block
and some rows of its inputs are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.checkpoint import Checkpoint
from ..quantization.quantize import dequantise, quantise
from ..quantization.schemes import folded_layers
from .dataset import CalibrationSet
from .folding import fed_by, groups, watch_inputs

if TYPE_CHECKING:
    from torch import Tensor

ALPHAS = tuple(step / 20 for step in range(21))

ROWS = 512
"""Inputs (tokens) of a group that factors are tried on, drawn from all that were seen."""


Outputs = Callable[["Tensor", Mapping[str, "Tensor"]], "list[Tensor]"]
"""Inputs [rows, in] and weights by layer -> outputs to compare, each relative to its size."""


MIN_GAIN = 0.1
"""A gain under this part of the loss does not carry over to the model's outputs: nothing is scaled for it."""


class Inputs:
    """Statistics of the inputs of a group: mean magnitudes, and some rows drawn at random."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._keys = torch.empty(0)
        self.rows = torch.empty(0, 0)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Look at one input [..., in]."""
        x = x.reshape(-1, x.shape[-1]).float().cpu()
        total = x.abs().sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(x)
        # The rows with the smallest of all random keys: each row is as likely, however many follow.
        keys = torch.rand(len(x), generator=self._generator)
        near = keys.topk(min(ROWS, len(x)), largest=False)
        keys = torch.cat([self._keys, near.values])
        rows = torch.cat([self.rows.reshape(-1, x.shape[1]), x[near.indices]])
        best = keys.topk(min(ROWS, len(keys)), largest=False).indices
        self._keys, self.rows = keys[best], rows[best]

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of every channel [in]."""
        assert self._sum is not None
        return (self._sum / self._count).float()


def awq_factors(
    checkpoint: Checkpoint,
    components: Sequence[str],
    schemes: Mapping[str, str],
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    base: str = "bf16",
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Source -> divisor s [in] of its channels (fp32), to be folded by :func:`.folding.fold`.

    Args:
        schemes: layer -> scheme; those that ask for AWQ are searched.
        base: the recipe's base, which scales are rounded to.

    The others as :func:`.folding.watch_inputs`.
    """
    awq_layers = set(folded_layers(schemes, "awq"))
    members = {source: [m for m in fed if m in awq_layers] for source, fed in groups(awq_layers).items()}
    first = {fed[0]: source for source, fed in members.items()}  # all of a group take the same input
    seen: dict[str, Inputs] = {}
    factors: dict[str, Tensor] = {}

    def see(layer: str, x: Tensor) -> None:
        seen.setdefault(layer, Inputs()).add(x)

    def passed() -> None:
        for layer, inputs in seen.items():
            source = first[layer]
            weights = {m: checkpoint.load(f"{m}.weight").float() for m in members[source]}
            factors[source] = search(inputs, weights, schemes, base, outputs_of(source, checkpoint))
        seen.clear()

    run = (checkpoint, components, chosen, settings, tokenizer, folder)
    watch_inputs(see, first, *run, batch_size=batch_size, progress=progress, passed=passed)
    return factors


def search(
    inputs: Inputs, weights: Mapping[str, Tensor], schemes: Mapping[str, str], base: str, outputs: Outputs
) -> Tensor:
    """The factors [in] with which rounded ``weights`` (layer -> [out, in]) change ``outputs`` least."""
    rows = inputs.rows
    exact = outputs(rows, weights)
    best, least = torch.ones_like(inputs.mean), float("inf")
    for alpha in ALPHAS:
        divisor = scaling(inputs.mean, alpha)
        rounded = {m: _rounded(w * divisor, schemes[m], base) / divisor for m, w in weights.items()}
        loss = sum(
            float((got - want).square().sum() / want.square().sum().clamp_min(1e-30))
            for got, want in zip(outputs(rows, rounded), exact, strict=True)
        )
        if loss < least:
            best, least = divisor, loss
        if alpha == 0:
            least *= 1 - MIN_GAIN
    return best


def outputs_of(source: str, checkpoint: Checkpoint) -> Outputs:
    """The outputs that layers fed by ``source`` are judged by: their MLP's, or else their own."""
    block = source.rpartition(".")[0]

    def load(name: str) -> Tensor:
        return checkpoint.load(f"{block}.{name}").float()

    if f"{block}.mlp.fc1" in fed_by(source):
        bias, last = load("mlp.fc1.bias"), load("ls2")[:, None] * load("mlp.fc2.weight")
        return lambda x, weights: [F.gelu(F.linear(x, weights[f"{block}.mlp.fc1"], bias)) @ last.T]
    if f"{block}.mlp.gate_proj" in fed_by(source):
        parts = {
            f"{block}.mlp.{part}_proj": load(f"mlp.{part}_proj.weight") for part in ("gate", "up", "down")
        }

        def gated(x: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
            gate, up, down = {**parts, **weights}.values()
            return [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)]

        return gated

    def own(x: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
        products = {layer: F.linear(x, weight) for layer, weight in weights.items()}
        return [t for layer, y in products.items() for t in y.chunk(3 if layer.endswith(".qkv") else 1, 1)]

    return own


def scaling(mean: Tensor, alpha: float) -> Tensor:
    """``mean ** alpha`` [in] as powers of two, centred around 1; dead channels as the least."""
    floor = mean[mean > 0].min() if (mean > 0).any() else torch.tensor(1.0)
    exact = alpha * mean.clamp_min(float(floor)).log2()
    centred: Tensor = torch.exp2((exact - (exact.max() + exact.min()) / 2).round())
    return centred


def _rounded(weight: Tensor, scheme: str, base: str) -> Tensor:
    return dequantise(*quantise(weight, scheme, base))
