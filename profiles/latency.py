"""What is timed of a bundle: each component alone, and the chained calls of the runtime's ``InternVL``.

Every case names its boundary: what lies inside the timed call. Inputs are drawn at random within the
component's contract (times do not depend on the values), texts and prompts are fixed. Engines are opened, and
every shape has run, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..models.config import InternVLConfig
from ..models.layout import COMPONENTS
from ..preprocess import CAPTION_PROMPT
from ..runtime import InternVL, Mode
from ..specs import ComponentSpec
from .measure import Measurement, StopRule, measure

Array = np.ndarray[Any, Any]
Progress = Callable[[str, int, int], None]
"""Called with the case that comes next, how many are done, and how many there are."""

CAPTION_TOKENS = 30
TEXT = "a red circle to the left of a small blue square"


@dataclass(frozen=True)
class Case:
    """One timed call.

    Args:
        name: a component, or a chained call (``encode_image InternVL-C``).
        kind: ``component`` or ``chained``.
        batch: images or texts of one call.
        sizes: the dynamic axes; for chained calls what took their place (``tokens`` of a text).
        items: how many ``unit`` one call handles.
        unit: what throughput counts.
        boundary: what lies inside the timed call.
        measurement: samples and statistics.
        stages_ms: chained calls: mean milliseconds a call by stage, over all samples. Components by name;
            what is missing to the mean is the chain itself.
    """

    name: str
    kind: Literal["component", "chained"]
    batch: int
    sizes: dict[str, int]
    items: int
    unit: str
    boundary: str
    measurement: Measurement
    stages_ms: dict[str, float]

    @property
    def per_second(self) -> float:
        """Items per second."""
        return self.measurement.throughput(self.items)

    @property
    def mean_ms(self) -> float:
        """Mean over all samples, what :attr:`stages_ms` add up to together with the chain's own time."""
        return sum(self.measurement.samples_ns) / len(self.measurement.samples_ns) / 1e6

    @property
    def components_ms(self) -> float:
        """Chained calls: the components' share of :attr:`mean_ms`."""
        return sum(ms for stage, ms in self.stages_ms.items() if stage in COMPONENTS)

    def to_json(self) -> dict[str, Any]:
        """Plain data with the derived figures."""
        data = {**vars(self), "per_second": self.per_second, "measurement": self.measurement.to_json()}
        if self.kind == "chained":
            data |= {"mean_ms": self.mean_ms, "components_ms": self.components_ms}
        return data


@dataclass(frozen=True)
class Task:
    """A case to be timed; ``prepare`` makes its inputs and returns the call."""

    name: str
    kind: Literal["component", "chained"]
    batch: int
    sizes: dict[str, int]
    items: int
    unit: str
    boundary: str
    prepare: Callable[[], Callable[[], object]]


def plan(
    model: InternVL,
    config: InternVLConfig,
    batches: Sequence[int] | None = None,
    text_tokens: int | None = None,
) -> list[Task]:
    """All cases of a loaded bundle, components first.

    Args:
        model: the bundle.
        config: its model's sizes.
        batches: batch sizes; None: 1 and 8 as far as the engines take them.
        text_tokens: time texts of this length too, beside the length the engine is tuned for.

    Raises:
        UsageError: a batch size that an engine was not built for.
    """
    names = [name for name in COMPONENTS if name in model.bundle.manifest.components]
    specs = {name: model.components.spec(name) for name in names}
    tasks: list[Task] = []
    sizes_of = _batches(specs.values(), batches)
    for spec in specs.values():
        for batch in sizes_of:
            tasks += [_component(model, spec, config, s) for s in _sizes(spec, batch, text_tokens)]
    for batch in sizes_of:
        tasks += _chained(model, specs, batch)
    return tasks


def run(
    model: InternVL, tasks: Sequence[Task], rule: StopRule, progress: Progress | None = None
) -> tuple[Case, ...]:
    """Time every task after opening the engines they need."""
    for name in dict.fromkeys(task.name for task in tasks if task.kind == "component"):
        model.components.open(name)
    cases = []
    for done, task in enumerate(tasks):
        if progress is not None:
            progress(f"{task.name}, batch {task.batch}", done, len(tasks))
        cases.append(_time(model, task, rule))
    return tuple(cases)


def random_inputs(
    spec: ComponentSpec, sizes: dict[str, int], vocabulary: int, seed: int = 0
) -> dict[str, Array]:
    """Valid inputs of a component: drawn floats and token ids, everything visible, nothing padded."""
    generator = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tuple(d if isinstance(d, int) else sizes[d] for d in tensor.shape)
        if tensor.dtype == "float":
            inputs[tensor.name] = generator.standard_normal(shape, dtype=np.float32)
        elif tensor.name == "input_ids":
            first = min(3, vocabulary - 1)  # after unk, bos and eos
            inputs[tensor.name] = generator.integers(first, vocabulary, shape, dtype=np.int64)
        elif tensor.name == "lengths":
            inputs[tensor.name] = np.full(shape, sizes["text"], np.int64)
        elif tensor.name == "positions":
            positions = sizes["past"] + np.arange(sizes["text"], dtype=np.int64)
            inputs[tensor.name] = np.ascontiguousarray(np.broadcast_to(positions, shape))
        elif tensor.name == "attention_mask":
            inputs[tensor.name] = np.ones(shape, np.int64)
        else:
            raise UsageError(
                f"Component {spec.name} cannot be profiled.",
                f"What its input {tensor.name} ({tensor.dtype}) may hold is unknown to this release.",
            )
    spec.check(inputs)
    return inputs


def _batches(specs: Any, wanted: Sequence[int] | None) -> list[int]:
    axes = [(spec.name, spec.axis("batch")) for spec in specs]
    low, high = max(a.min for _, a in axes), min(a.max for _, a in axes)
    if wanted is None:
        return sorted({min(max(batch, low), high) for batch in (1, 8)})
    for batch in wanted:
        for name, axis in axes:
            if not axis.min <= batch <= axis.max:
                raise UsageError(
                    f"Batch {batch} cannot be profiled.",
                    f"{name} of this bundle takes {axis.min} to {axis.max}.",
                    f"Choose --batch between {low} and {high}.",
                )
    return list(dict.fromkeys(wanted))


def _sizes(spec: ComponentSpec, batch: int, text_tokens: int | None) -> list[dict[str, int]]:
    """The dynamic axes at the sizes the engine is tuned for; texts also at ``text_tokens``."""
    sizes = {axis.name: axis.opt for axis in spec.axes}
    sizes["batch"] = batch
    if "total" in sizes:
        sizes["total"] = sizes["past"] + sizes["text"]
    if spec.name != "qllama_text" or text_tokens in (None, sizes["text"]):
        return [sizes]
    axis = spec.axis("text")
    longer = [{**sizes, "text": text_tokens}] if text_tokens and axis.min <= text_tokens <= axis.max else []
    return [sizes, *longer]


def _component(model: InternVL, spec: ComponentSpec, config: InternVLConfig, sizes: dict[str, int]) -> Task:
    batch, unit = sizes["batch"], {"qllama_text": "texts", "qllama_step": "tokens"}.get(spec.name, "images")

    def prepare() -> Callable[[], object]:
        inputs = random_inputs(spec, sizes, config.qllama.vocab_size)
        return partial(model.components.open(spec.name).run, inputs)

    items = batch * sizes["text"] if unit == "tokens" else batch
    boundary = "one engine call: arrays in host memory in, all outputs in host memory out"
    return Task(spec.name, "component", batch, sizes, items, unit, boundary, prepare)


def _chained(model: InternVL, specs: dict[str, ComponentSpec], batch: int) -> list[Task]:
    """The chained calls that the bundle's components allow."""
    tasks: list[Task] = []
    if "vision" in specs:
        shape = specs["vision"].shape(specs["vision"].inputs[0], "opt")[1:]
        modes: tuple[Mode, ...] = ("InternVL-C", "InternVL-G") if "qllama_query" in specs else ("InternVL-C",)
        boundary = "pixel_values in, embeddings out; reading and resizing images is not in it"
        for mode in modes:
            prepare = partial(_encode_image, model, (batch, *shape), mode)
            tasks.append(
                Task(f"encode_image {mode}", "chained", batch, {}, batch, "images", boundary, prepare)
            )
        if {"qllama_query", "qllama_step"} <= specs.keys():
            tasks += _caption(model, specs, (batch, *shape))
    if "qllama_text" in specs:
        _, lengths = model.tokenizer.encode_contrastive([TEXT])
        boundary = "strings in, embeddings out: tokenizing is in it"
        call = partial(model.encode_text, [TEXT] * batch)
        sizes = {"tokens": int(lengths[0])}
        tasks.append(Task("encode_text", "chained", batch, sizes, batch, "texts", boundary, lambda: call))
    return tasks


def _caption(model: InternVL, specs: dict[str, ComponentSpec], shape: tuple[int, ...]) -> list[Task]:
    prompt = len(model.tokenizer.encode_prompt(CAPTION_PROMPT["en"]))
    queries = next(t for t in specs["qllama_query"].outputs if t.name == "key.0").shape[2]
    room = specs["qllama_step"].axis("past").max - int(queries) - prompt + 1
    count, batch = min(CAPTION_TOKENS, room), shape[0]
    if count < 1:
        return []  # built for a past too short for the prompt
    boundary = f"pixel_values in, texts out: greedy, exactly {count} tokens an image, tokenizer included"
    sizes = {"prompt": prompt, "new_tokens": count}
    prepare = partial(_generate, model, shape, count)
    return [Task("caption", "chained", batch, sizes, batch * count, "tokens", boundary, prepare)]


def _encode_image(model: InternVL, shape: tuple[int, ...], mode: Mode) -> Callable[[], object]:
    return partial(model.encode_image, _pixels(shape), mode)


def _generate(model: InternVL, shape: tuple[int, ...], count: int) -> Callable[[], object]:
    return partial(model.caption, _pixels(shape), max_new_tokens=count, min_new_tokens=count)


def _pixels(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _time(model: InternVL, task: Task, rule: StopRule) -> Case:
    call = task.prepare()
    before: dict[str, float] = {}

    def remember() -> None:
        before.update({stage: t.seconds for stage, t in model.timings.items()})

    measurement = measure(call, rule, after_warmup=remember)
    spent = {stage: t.seconds - before.get(stage, 0.0) for stage, t in model.timings.items()}
    scale = 1e3 / len(measurement.samples_ns)
    stages = {stage: seconds * scale for stage, seconds in spent.items() if seconds > 0}
    return Case(
        task.name,
        task.kind,
        task.batch,
        task.sizes,
        task.items,
        task.unit,
        task.boundary,
        measurement,
        stages if task.kind == "chained" else {},
    )
