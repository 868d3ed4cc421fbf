"""Profiles a bundle: opens it, times its calls, counts their work, and makes the receipt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from ...bundle import Bundle
from ...bundle.manifest import MANIFEST, Model
from ...engines.base import known_backend
from ...engines.device import HOST
from ...errors import BuildError, CapabilityError, UsageError
from ...files.hashing import sha256_file
from ...models.config import ChatConfig, InternVLConfig
from ...models.registry import CONTRASTIVE, ModelConfig, component_names, config_from_published, family_of
from ...progress import SILENT, Progress, reported
from ...runtime import InternVL, InternVLChat
from ...runtime.load import model_on
from ...runtime.loaded import Loaded
from ..cost.flops import ComponentCost, graph_cost
from ..cost.roofline import Arithmetic, component_cost
from ..cost.table19 import BATCH, PAPER_RATES, TEXT_TOKENS, different_model, table19
from . import baseline, chat_latency, latency
from .cases import Case, Task
from .ceilings import Ceilings, floor_of, measure_ceilings
from .inputs import TEXT, jpeg, random_inputs
from .latency import batches_of, check_lengths, run, sizes_of
from .machine import commit, machine, peak_memory, versions
from .receipt import Profile, Settings, Startup, Subject
from .recording import RecordingComponents
from .sensors import Clocks, watch
from .timing import StopRule

BASELINE_PARTS = ("vision", "qllama_query", "qllama_text")


@dataclass(frozen=True)
class Options:
    """Settings of a profile.

    Args:
        backend, target, threads: see :func:`ivl_export.load`.
        device: where the backend computes (``cuda:0``); None: its own choice.
        batches: batch sizes; None: 1 and 8, with the paper's tables 1 and 128, as far as the engines take
            them.
        lengths: lengths of texts to time besides the one the engines are tuned for.
        rule: when each measurement ends.
        table19: include the paper's cost tables for any model; the full model always has them.
        baseline: with the tables, time the PyTorch modules in bf16 too, if torch is installed.
        checkpoint: the bundle's checkpoint, for the baseline; None: the one it was built from.
        ceilings: measure the machine's best rates, so that times have floors.
    """

    backend: str = "onnxruntime"
    target: str | None = None
    threads: int | None = None
    device: str | None = None
    batches: Sequence[int] | None = None
    lengths: Sequence[int] = ()
    rule: StopRule = field(default_factory=StopRule)
    table19: bool = False
    baseline: bool = True
    checkpoint: Path | None = None
    ceilings: bool = True

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of the backend."""
        arguments = {"threads": self.threads, "device": self.device}
        return {key: value for key, value in arguments.items() if value is not None}


def profile(path: Path | str, options: Options | None = None, progress: Progress = SILENT) -> Profile:
    """Profile the bundle in ``path`` on this machine; ``progress`` receives its parts as steps.

    Raises:
        UsageError: an unknown backend, a batch size or a length that the engines do not take, or a checkpoint
            with other weights.
        IntegrityError, CapabilityError, CheckpointError: the bundle is damaged or cannot run here.
    """
    options, here = options or Options(), machine()
    bundle = Bundle.open(path, "size")
    about, config = bundle.manifest.model, config_from_published(bundle.manifest.model.config)
    if not set(component_names(config, optional=True)) & set(bundle.manifest.components):
        raise CapabilityError(
            f"{bundle.root} cannot be profiled.",
            f"It holds {', '.join(bundle.manifest.components)}; its config is of {family_of(config).title}.",
            "Build it again.",
        )
    paper = _of_paper(about, config, options)
    notes: list[str] = []
    checkpoint = None
    if paper is not None and options.baseline:  # before anything is timed: a wrong checkpoint is said at once
        checkpoint, why_not = baseline.find_checkpoint(about, options.checkpoint)
        notes += [why_not] if why_not else []
    known_backend(options.backend)
    check_lengths((bundle.spec(name) for name in bundle.manifest.components), options.lengths, config)
    with watch() as watched:
        started = time.perf_counter()
        components = RecordingComponents(bundle, options.backend, options.target, None, **options.engine)
        with model_on(bundle, components) as model:
            first_ms, boundary = _first_request(model, started)
            device = components.open(next(iter(bundle.manifest.components))).device
            batches = _batches(bundle, options, paper is not None)
            lengths = tuple(dict.fromkeys((*options.lengths, *((TEXT_TOKENS,) if paper is not None else ()))))
            tasks = _plan(model, config, batches, lengths)
            startup = _startup(model, config, first_ms, boundary)
            cases = list(run(model, tasks, options.rule, progress))
        memory = peak_memory()  # of the engines: the baseline and the ceilings take more
        if checkpoint is not None and paper is not None:
            baseline_calls = [
                (bundle.spec(name), sizes)
                for name in BASELINE_PARTS
                if name in bundle.manifest.components and name in checkpoint.components
                for batch in dict.fromkeys(case.batch for case in cases)
                for sizes in sizes_of(bundle.spec(name), batch, lengths, paper)
                if sizes.get("text", TEXT_TOKENS) == TEXT_TOKENS
            ]
            cases += baseline.run_baseline(
                checkpoint, paper, baseline_calls, options.rule, options.threads, progress
            )
        ceilings = _ceilings(options, device, progress)
    costs, uncounted = _costs(bundle, options.backend, cases)
    gpu = next(iter(here.gpus), None)
    return Profile(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        subject=_subject(bundle, config),
        settings=Settings(
            options.backend, options.target, options.threads,
            tuple(dict.fromkeys(c.batch for c in cases)), tuple(options.lengths), options.rule,
            device,
        ),
        machine=here,
        clocks=watched.clocks or Clocks(None, None, ()),
        versions=versions(),
        commit=commit(),
        startup=startup,
        peak_memory_bytes=memory,
        peak_device_bytes=_device_peak(watched.clocks),
        cases=tuple(_with_floors(cases, costs, paper, ceilings)),
        costs=costs,
        ceilings=ceilings,
        table19=table19(about, paper, cases, gpu.name if gpu and device != HOST else here.cpu)
        if paper is not None
        else None,
        notes=(*notes, *uncounted, *(ceilings.notes if ceilings else ())),
    )  # fmt: skip


def _of_paper(about: Model, config: ModelConfig, options: Options) -> InternVLConfig | None:
    """The model's sizes if the paper's tables are to be filled; UsageError if it has none."""
    family = family_of(config)
    if family.form == CONTRASTIVE:
        sizes = cast(InternVLConfig, config)
        return sizes if options.table19 or different_model(about, sizes) is None else None
    if options.table19:
        raise UsageError(
            f"{family.title[0].upper()}{family.title[1:]} has no place in Table 19.",
            "It is about InternVL-C and -G.",
            "Drop --table19.",
        )
    return None


def _plan(
    model: Loaded, config: ModelConfig, batches: Sequence[int] | None, lengths: Sequence[int]
) -> list[Task]:
    if isinstance(model, InternVLChat):
        return chat_latency.plan(model, cast(ChatConfig, config), batches, lengths)
    return latency.plan(model, config, batches, lengths)


def _first_request(model: Loaded, started: float) -> tuple[float, str]:
    """Milliseconds since ``started`` once the first request is answered, and its description."""
    opened = "opening that engine, one call"
    if isinstance(model, InternVLChat) and model.tokenizer.reads_texts:
        model.chat([jpeg()]).ask(TEXT, max_new_tokens=1)
        request, opened = "the first token about one JPEG", "opening all engines, one call of each"
    elif isinstance(model, InternVL) and model.components.gives("image_embed"):
        model.encode_image([jpeg()])
        request = "one JPEG's InternVL-C embedding"
    elif isinstance(model, InternVL) and model.components.gives("text_embed"):
        model.encode_text([TEXT])
        request = "one text's embedding"
    else:
        name = next(iter(model.bundle.manifest.components))
        model.components.open(name)
        request = f"the engine of {name}"
    boundary = f"from the opened manifest to {request}: {opened}; imports done before"
    return (time.perf_counter() - started) * 1e3, boundary


def _startup(model: Loaded, config: ModelConfig, first_ms: float, boundary: str) -> Startup:
    """Open every engine and call it once."""
    calls: dict[str, float] = {}
    for name in latency.specs_of(model, config):
        before = model.timings.get(name)
        if before is not None:  # the first request called it
            calls[name] = before.seconds * 1e3
            continue
        spec = model.components.spec(name)
        sizes = sizes_of(spec, batches_of([spec], None)[0], (), config)[0]
        inputs, engine = (
            random_inputs(spec, sizes, family_of(config).vocabulary(config)),
            model.components.open(name),
        )
        began = time.perf_counter()
        engine.run(inputs)
        calls[name] = (time.perf_counter() - began) * 1e3
    load = {k.removeprefix("open "): t.seconds for k, t in model.timings.items() if k.startswith("open ")}
    return Startup(boundary, first_ms, load, calls)


def _batches(bundle: Bundle, options: Options, tables: bool) -> Sequence[int] | None:
    """The requested sizes, or those of the paper's tables as far as every engine takes them."""
    if options.batches is not None or not tables:
        return options.batches
    axes = [bundle.spec(name).axis("batch") for name in bundle.manifest.components]
    low, high = max(axis.min for axis in axes), min(axis.max for axis in axes)
    return sorted({min(max(batch, low), high) for batch in (*PAPER_RATES, BATCH)})


def _ceilings(options: Options, device: str, progress: Progress) -> Ceilings | None:
    if not options.ceilings:
        return None
    with reported(progress, "measure ceilings"):
        return measure_ceilings(options.threads, replace(options.rule, min_samples=3), gpu=device != HOST)


def _subject(bundle: Bundle, config: ModelConfig) -> Subject:
    manifest = bundle.manifest
    return Subject(
        bundle.root.resolve().name,
        sha256_file(bundle.root / MANIFEST),
        manifest.model.name,
        manifest.model.parameters,
        manifest.recipe,
        manifest.compute_dtype,
        config.image_size,
    )


def _device_peak(clocks: Clocks | None) -> int | None:
    """Largest growth of a GPU's memory since the start; None without a reading."""
    growths = [
        gpu.peak_used_bytes - gpu.used_before_bytes
        for gpu in (clocks.gpus if clocks else ())
        if gpu.peak_used_bytes is not None and gpu.used_before_bytes is not None
    ]
    return max(growths, default=None)


def _with_floors(
    cases: Iterable[Case],
    costs: Sequence[ComponentCost],
    config: InternVLConfig | None,
    ceilings: Ceilings | None,
) -> Iterable[Case]:
    """``cases`` with the floors of their calls; the baseline's work follows from the configuration."""
    wide = Arithmetic(baseline.PRECISION, {})
    for case in cases:
        if ceilings is None:
            yield case
        elif case.kind == "baseline" and config is not None:
            own = [component_cost(case.name, config, case.sizes, wide)]
            yield replace(case, floor=floor_of(case, own, ceilings))
        else:
            yield replace(case, floor=floor_of(case, costs, ceilings))


def _costs(
    bundle: Bundle, backend: str, cases: Sequence[Case]
) -> tuple[tuple[ComponentCost, ...], tuple[str, ...]]:
    """FLOPs and bytes of all engine calls, and reasons where they cannot be counted."""
    # ONNX Runtime computes in fp32 on the CPU; a compiled engine in the bundle's own type.
    compute_type = "fp32" if backend == "onnxruntime" else bundle.manifest.compute_dtype
    calls = {
        (call.component, *sorted(call.sizes.items())): call
        for case in cases
        if case.kind != "baseline"
        for call in case.calls
    }
    costs, notes = [], []
    for call in calls.values():
        graphs = bundle.manifest.components[call.component].graphs
        dtype = compute_type if compute_type in graphs else next(iter(graphs), compute_type)
        try:
            spec, graph = bundle.spec(call.component), bundle.graph(call.component, dtype)
            costs.append(graph_cost(graph, spec, call.sizes, dtype))
        except (CapabilityError, BuildError) as error:
            notes.append(f"FLOPs and bytes of {call.component}: {error}")
    return tuple(costs), tuple(dict.fromkeys(notes))
