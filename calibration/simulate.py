"""Accuracy of a quantised model that does not fit into memory: its blocks simulated in torch, one at a time.

The stored 8-bit values and scales are dequantised as the graph's DequantizeLinear does, the inputs of the
quantised layers go through QuantizeLinear and DequantizeLinear, products are computed in fp32. An fp32 flow
and the simulated ones go through a part side by side, so that nothing but hidden states is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..export.weight_store import open_store
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.registry import component_spec
from ..models.storage import open_reader
from ..quantization.attention import attention_scales, core_attentions, fake_attention
from ..quantization.quantize import LOWEST, activation_scale, dequantise, quantise_values, stored_names
from ..quantization.ranges import ActivationRanges
from ..quantization.schemes import SCHEMES
from .accuracy import Comparison, Metrics, Table
from .block_stream import Flow, visit
from .dataset import CalibrationSet
from .forward_calls import samples_of
from .magnitudes import MagnitudeObserver, Magnitudes
from .segments import Load, Modules, needed, needs, segments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Quantised:
    """A quantised model as it is stored.

    Args:
        stores: files with the 8-bit values and scales, and with the weights that stay in the base type.
        schemes: quantised layer -> one of :data:`..quantization.schemes.SCHEMES`.
        base: ``bf16`` or ``fp16``.
        ranges: ranges of the layers' inputs; None where ``schemes`` is empty.
        attention: component -> its attentions that run in FP8.
    """

    stores: Sequence[Path]
    schemes: Mapping[str, str]
    base: str
    ranges: ActivationRanges | None
    attention: Mapping[str, Collection[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulated:
    """Accuracy against fp32, as :func:`.accuracy.component_accuracy` measures it.

    Args:
        teacher_forced: component -> output -> metrics; every component got fp32 inputs.
        chained: the same, components fed with each other's outputs.
        blocks: component -> metrics of the hidden states after each block, with the errors of all blocks
            before it (chained where the component is chained).
        magnitudes: how large everything became in the fp32 model.
    """

    teacher_forced: Table
    chained: Table
    blocks: dict[str, list[Metrics]]
    magnitudes: Magnitudes


def simulated_accuracy(
    checkpoint: Checkpoint,
    components: Sequence[str],
    quantised: Quantised,
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> Simulated:
    """Run ``chosen`` through the fp32 and the quantised ``components``, block by block.

    Args:
        checkpoint: the fp32 weights.
        components: those that ``quantised`` has weights and ranges for.
        quantised: weights, schemes and ranges to simulate.
        chosen: held-out samples.
        settings, tokenizer: of the model.
        folder: where activations are spilled; the caller removes it.
        batch_size: samples in memory at a time.
        device: where blocks run; an fp32 block and a simulated one are there at a time.
        progress: callback with the number of :func:`.calibrate.calibration_units` done.

    Raises:
        BuildError: NaN or infinity in a quantised component; too little disk.
    """
    config = checkpoint.model
    order = needed(components, config)
    samples = samples_of(chosen, settings, tokenizer, config, order, batch_size)
    here = [c for c in order if c in components]
    simulated = Modules(checkpoint, here, _stored(quantised), device)
    exact = Modules(checkpoint, order, device=device)
    observer = MagnitudeObserver(exact.by_name)
    reference = Flow(exact, samples, folder, "fp32", observer=observer)
    # Components that take no other's outputs are the same in both modes: they run once.
    chained = [c for c in here if needs(c, config) <= set(here)]
    fed = [c for c in here if needs(c, config)]
    flows = [
        reference,
        Flow(simulated, samples, folder, "chained", components=chained),
        Flow(simulated, samples, folder, "forced", source=reference, components=fed),
    ]
    compared: list[dict[str, dict[str, Comparison]]] = [{}, {}]
    blocks: dict[str, list[Comparison]] = {}
    try:
        with _fake_quantised(simulated, quantised):
            for number, segment in enumerate(segments(config, order)):
                before = number * samples.count
                for call, results in visit(segment, samples, flows, progress, before):
                    want = results[0]
                    assert want is not None
                    for got, table in zip(results[1:], compared, strict=True):
                        if got is not None:
                            outputs = table.setdefault(call.component, {})
                            for name, tensor in want[1].items():
                                _add(outputs.setdefault(name, Comparison(name)), tensor, got[1][name])
                    got = results[1] or results[2]
                    if got is not None and not segment.entry and not segment.exit:
                        depth = blocks.setdefault(call.component, [])
                        if len(depth) == segment.block:
                            depth.append(Comparison())
                        _add(depth[segment.block], want[0], got[0])
    finally:
        for flow in flows:
            flow.close()
        observer.close()

    def ordered(component: str, table: dict[str, dict[str, Comparison]]) -> dict[str, Metrics]:
        names = [tensor.name for tensor in component_spec(component, config).outputs]
        return {name: table[component][name].metrics() for name in names}

    return Simulated(
        {c: ordered(c, compared[1] if c in fed else compared[0]) for c in here},
        {c: ordered(c, compared[0]) for c in chained},
        {c: [comparison.metrics() for comparison in blocks[c]] for c in here if c in blocks},
        observer.result(samples.count),
    )


def _stored(quantised: Quantised) -> Load:
    """fp32 weights as the graph reads them: dequantised, or from the base type."""
    store = open_store(*quantised.stores)
    readers = {path: open_reader(path) for path in {ref.file for ref in store.values()}}

    def read(name: str) -> torch.Tensor:
        return readers[store[name].file](store[name].name)

    def load(key: str) -> torch.Tensor:
        layer = key.removesuffix(".weight")
        if layer == key or layer not in quantised.schemes:
            return read(key).float()
        values, _, scale = stored_names(layer, quantised.schemes[layer], quantised.base)
        return dequantise(read(values), read(scale))

    return load


@contextmanager
def _fake_quantised(modules: Modules, quantised: Quantised) -> Iterator[None]:
    """Inputs of the quantised layers and attentions go through Q and DQ inside the ``with`` block."""
    amax = quantised.ranges.amax if quantised.ranges else {}
    with ExitStack() as stack:
        for component, module in modules.by_name.items():
            for name, layer in module.named_modules():
                scheme, top = quantised.schemes.get(name), amax.get(component, {}).get(name)
                kind = SCHEMES[scheme].activation if scheme else ""
                if not kind or top is None:
                    continue
                handle = layer.register_forward_pre_hook(rounding_hook(top, kind, quantised.base))
                stack.callback(handle.remove)
            cores = core_attentions(module)
            for name in quantised.attention.get(component, ()):
                hook = attention_hook(name, amax[component], quantised.base)
                stack.callback(cores[name].register_forward_hook(hook).remove)
        yield


def rounding_hook(amax: float, kind: str, base: str) -> Callable[..., tuple[torch.Tensor]]:
    """A forward pre-hook that rounds a layer's input to ``kind`` (``fp8``, ``int8``), as its Q and DQ do."""
    scale = activation_scale(amax, kind, base)

    def hook(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        factor = torch.tensor(scale, device=args[0].device)
        return (quantise_values(args[0], factor, kind, LOWEST[kind]).float() * factor,)

    return hook


def attention_hook(attention: str, amax: Mapping[str, float], base: str) -> Callable[..., torch.Tensor]:
    """A forward hook that makes a core attention an FP8 one."""
    scales = attention_scales(attention, amax, base)
    return lambda _, args, __: fake_attention(*args, scales=scales, base=base)


def _add(comparison: Comparison, want: torch.Tensor, got: torch.Tensor) -> None:
    comparison.add(want.cpu().numpy(), got.cpu().numpy())
