"""Times a bundle: each component alone, the chained calls, and the host's work besides.

The chained calls of a chat are in :mod:`.chat_latency`.

Every case names its boundary: the extent of the timed call. Inputs are drawn at random within the
component's contract (times do not depend on the values), texts and prompts are fixed. Engines are opened, and
every shape has run, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ...bundle.spec import ComponentSpec
from ...errors import UsageError
from ...inputs.tokenizer import CAPTION_PROMPT
from ...models.registry import ModelConfig, component_names, component_of, family_of
from ...progress import SILENT, Progress, reported
from ...runtime import InternVL, Mode
from ...runtime.loaded import Loaded
from .cases import Case, Task
from .device_timing import resident_tasks
from .inputs import JPEG_SIZE, TEXT, jpeg, random_inputs, random_pixels
from .recording import RecordingComponents
from .timing import StopRule

CAPTION_TOKENS = 30
LABELS = 1000


def plan(
    model: Loaded,
    config: ModelConfig,
    batches: Sequence[int] | None = None,
    lengths: Sequence[int] = (),
) -> list[Task]:
    """All cases of a loaded bundle, components first.

    Args:
        model: the bundle.
        config: its model's sizes.
        batches: batch sizes; None: 1 and 8 as far as the engines take them.
        lengths: time texts of these lengths too, besides the one the engine is tuned for, and decoding steps
            with so many text positions in their past; as far as the engines take them.

    Raises:
        UsageError: a batch size that an engine was not built for.
    """
    specs = specs_of(model, config)
    chosen = batches_of(specs.values(), batches)
    tasks = [
        task
        for spec in specs.values()
        for batch in chosen
        for sizes in sizes_of(spec, batch, lengths, config)
        for task in component(model, spec, config, sizes)
    ]
    if isinstance(model, InternVL):
        for batch in chosen:
            tasks += _chained(model, specs, batch)
        for batch in chosen:
            tasks += _host(model, specs, batch)
    return named(model, tasks)


def specs_of(model: Loaded, config: ModelConfig) -> dict[str, ComponentSpec]:
    """The contracts of the components that the bundle holds, in the order of the chain."""
    bundled = model.bundle.manifest.components
    names = component_names(config, optional=True)
    return {name: model.components.spec(name) for name in names if name in bundled}


def named(model: Loaded, tasks: Iterable[Task]) -> list[Task]:
    """``tasks`` with backend and precision."""
    backend, precision = model.components.backend, model.bundle.manifest.recipe
    return [
        task.of("host", "") if task.kind == "host" else task.of(backend + task.backend, precision)
        for task in tasks
    ]


def run(
    model: Loaded, tasks: Sequence[Task], rule: StopRule, progress: Progress = SILENT
) -> tuple[Case, ...]:
    """Time every task after opening the engines they need."""
    for name in dict.fromkeys(task.name for task in tasks if task.kind == "component"):
        model.components.open(name)
    cases = []
    with reported(progress, "measure", len(tasks)) as advanced:
        for number, task in enumerate(tasks):
            advanced(number, detail=f"{task.name}, batch {task.batch}")
            stages = record = None
            if task.kind == "chained":
                stages = partial(_seconds, model)
                record = model.components.calls if isinstance(model.components, RecordingComponents) else None
            cases.append(task.time(rule, stages, record))
    return tuple(cases)


def batches_of(specs: Iterable[ComponentSpec], batches: Sequence[int] | None) -> list[int]:
    """Batch sizes that all of ``specs`` take: ``batches`` without repetition, or 1 and 8 as far as they go.

    Raises:
        UsageError: one of ``batches`` is out of their range.
    """
    axes = [(spec.name, spec.axis("batch")) for spec in specs]
    low, high = max(a.min for _, a in axes), min(a.max for _, a in axes)
    if batches is None:
        return sorted({min(max(batch, low), high) for batch in (1, 8)})
    for batch in batches:
        for name, axis in axes:
            if not axis.min <= batch <= axis.max:
                raise UsageError(
                    f"Batch {batch} cannot be profiled.",
                    f"{name} of this bundle takes {axis.min} to {axis.max}.",
                    f"Choose --batch between {low} and {high}.",
                )
    return list(dict.fromkeys(batches))


def sizes_of(
    spec: ComponentSpec, batch: int, lengths: Sequence[int], config: ModelConfig
) -> list[dict[str, int]]:
    """The dynamic axes at the sizes the engine is tuned for, and at ``lengths`` as far as it takes them."""
    tuned = {axis.name: axis.opt for axis in spec.axes} | {"batch": batch}
    variants = [tuned]
    if (swept := component_of(spec.name, config).swept(config)) is not None:
        name, before = swept
        axis = spec.axis(name)
        variants += [{**tuned, name: before + n} for n in lengths if axis.min <= before + n <= axis.max]
    for sizes in variants:
        if "total" in sizes:
            sizes["total"] = sizes["past"] + sizes["text"]
    return [sizes for i, sizes in enumerate(variants) if sizes not in variants[:i]]


def check_lengths(specs: Iterable[ComponentSpec], lengths: Sequence[int], config: ModelConfig) -> None:
    """UsageError if one of ``lengths`` is of no text that any of the engines takes."""
    ranges = []
    for spec in specs:
        if (swept := component_of(spec.name, config).swept(config)) is not None:
            axis = spec.axis(swept[0])
            ranges.append((axis.min - swept[1], axis.max - swept[1]))
    for length in lengths:
        if not any(low <= length <= high for low, high in ranges):
            longest = max((high for _, high in ranges), default=0)
            raise UsageError(
                f"Texts of {length} tokens cannot be profiled.",
                f"The engines of this bundle take at most {longest}.",
                "Choose shorter --lengths.",
            )


def component(model: Loaded, spec: ComponentSpec, config: ModelConfig, sizes: dict[str, int]) -> list[Task]:
    """One call of a component, host memory to host memory; on a GPU first within its memory, by its clock."""

    vocabulary = family_of(config).vocabulary(config)

    def prepare() -> Callable[[], object]:
        inputs = random_inputs(spec, sizes, vocabulary)
        return partial(model.components.open(spec.name).run, inputs)

    unit = component_of(spec.name, config).unit
    boundary = "one engine call: arrays in host memory in, all outputs in host memory out"
    task = Task.component("component", spec.name, unit, sizes, boundary, prepare)
    return [*resident_tasks(task, model.components, partial(random_inputs, spec, sizes, vocabulary)), task]


def _chained(model: InternVL, specs: dict[str, ComponentSpec], batch: int) -> list[Task]:
    """The chained calls that the bundle's components allow."""
    tasks: list[Task] = []
    vision, caption = specs.get(model.components.gives("image_embed")), specs.get("qllama_step")
    if vision is not None:
        shape = (batch, *vision.shape(vision.inputs[0], "opt")[1:])
        modes: tuple[Mode, ...] = (
            ("InternVL-C", "InternVL-G") if specs.get("qllama_query") else ("InternVL-C",)
        )
        boundary = "pixel_values in, embeddings out; reading and resizing images is not in it"
        for mode in modes:
            prepare = partial(_encode_image, model, shape, mode)
            tasks.append(
                Task(f"encode_image {mode}", "chained", batch, {}, batch, "images", boundary, prepare)
            )
        boundary = (
            f"JPEG files of {JPEG_SIZE[0]} x {JPEG_SIZE[1]} in memory in, probabilities of {LABELS:,} labels "
            "out: decoding, resizing, InternVL-C and softmax; label embeddings ready"
        )
        prepare = partial(_classify, model, batch)
        tasks.append(
            Task("classify", "chained", batch, {"labels": LABELS}, batch, "images", boundary, prepare)
        )
        if caption is not None and specs.get("qllama_query"):
            tasks += _caption(model, specs, shape)
    if specs.get("qllama_text"):
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


def _host(model: InternVL, specs: dict[str, ComponentSpec], batch: int) -> list[Task]:
    """The host's work before and after the engines, timed without them."""
    tasks = []
    if specs.get(model.components.gives("image_embed")):
        width, height = JPEG_SIZE
        boundary = f"JPEG files of {width} x {height} in memory in, pixels out: decode, resize, normalise"
        prepare = partial(preprocessing, model, batch)
        tasks.append(Task("preprocess", "host", batch, {}, batch, "images", boundary, prepare))
        boundary = f"embeddings in, probabilities of {LABELS:,} labels out: normalise, product, softmax"
        prepare = partial(_probabilities, model, batch)
        tasks.append(Task("postprocess classify", "host", batch, {}, batch, "images", boundary, prepare))
    if specs.get("qllama_text"):
        call = partial(model.tokenizer.encode_contrastive, [TEXT] * batch)
        tasks.append(
            Task("tokenize", "host", batch, {}, batch, "texts", "strings in, token ids out", lambda: call)
        )
    if specs.get("qllama_step"):
        boundary = f"{CAPTION_TOKENS} token ids an image in, strings out"
        prepare = partial(detokenizing, model, batch)
        tasks.append(Task("postprocess caption", "host", batch, {}, batch, "texts", boundary, prepare))
    return tasks


def _encode_image(model: InternVL, shape: tuple[int, ...], mode: Mode) -> Callable[[], object]:
    return partial(model.encode_image, random_pixels(shape), mode)


def _generate(model: InternVL, shape: tuple[int, ...], count: int) -> Callable[[], object]:
    return partial(model.caption, random_pixels(shape), max_new_tokens=count, min_new_tokens=count)


def _classify(model: InternVL, batch: int) -> Callable[[], object]:
    return partial(model.classify, [jpeg()] * batch, random_pixels((LABELS, _width(model))))


def preprocessing(model: Loaded, batch: int) -> Callable[[], object]:
    """Decoding and resizing a batch of JPEG files."""
    from ...inputs.preprocess import preprocess_images

    return partial(preprocess_images, [jpeg()] * batch, model.image_settings)


def _probabilities(model: InternVL, batch: int) -> Callable[[], object]:
    from ...runtime.zero_shot import probabilities

    width, scale = _width(model), model.bundle.manifest.model.logit_scale
    return partial(probabilities, random_pixels((batch, width)), random_pixels((LABELS, width)), scale)


def detokenizing(model: Loaded, batch: int) -> Callable[[], object]:
    """Strings of :data:`CAPTION_TOKENS` token ids each."""
    tokenizer, count = model.tokenizer, len(model.tokenizer)
    ids = [3 + i % (count - 3) for i in range(CAPTION_TOKENS)]
    return lambda: [tokenizer.decode(ids) for _ in range(batch)]


def _width(model: InternVL) -> int:
    outputs = model.components.spec("vision").outputs
    return int(next(t for t in outputs if t.name == "image_embed").shape[1])


def _seconds(model: Loaded) -> dict[str, float]:
    return {stage: t.seconds for stage, t in model.timings.items()}
