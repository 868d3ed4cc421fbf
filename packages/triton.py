"""``--format triton``: a model repository for NVIDIA's Triton Inference Server, and the image that serves it.

Two kinds of models. Those of the graphs (``vision``, ``decoder`` ...) take and give tensors, in Triton's ONNX
Runtime or TensorRT backend. Those of the tasks (``embed_image``, ``caption``, ``chat`` ...) take image files
and texts: Triton's Python backend runs ``model.py`` (:mod:`.triton_model`) on the bundle, which is there
once, next to the repository. A task's process opens only the components that it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..bundle.manifest import EngineFile
from ..errors import CapabilityError
from ..runtime.components import fixed
from ..settings import SWITCH, Setting, choice, switch, whole
from .contract import BUNDLE, Ability, File, Format, Job
from .distribution import (
    PROJECT,
    WHEEL,
    constraint_lines,
    environment,
    requirement_lines,
    text_of,
    write_wheel,
)
from .docker import IMAGE
from .own_weights import with_own_weights
from .project import DEVICE, EXTRAS
from .triton_config import (
    FILES,
    Serving,
    component_config,
    ensemble_config,
    parameters,
    tensor,
)
from .triton_config import text as config_text

MODELS = "models"
WEIGHTS = "weights.bin"
"""Of a graph's own model."""
RTX = "tensorrt-rtx"
DEFAULT_IMAGE = "nvcr.io/nvidia/tritonserver:26.08-py3"
PYTHON = "3.12"
"""Of Triton's images."""
ENGINES = Setting(
    "auto, onnxruntime or tensorrt",
    "engines of the graphs' models; auto: TensorRT's where the bundle has them. Triton does not run those of "
    "TensorRT-RTX",
    choice(("auto", "onnxruntime", "tensorrt")),
    default="auto",
)
GRAPHS = Setting(
    SWITCH, "models of the graphs, too, which take a second copy of the weights", switch, default=True
)
INSTANCES = Setting("1, 2 or more", "instances of each model; else 1", whole(1), default=1)
DELAY = Setting(
    "2000, 0 or more", "microseconds that a request waits for others; else 2000", whole(), default=2000
)

_IMAGE_IN = tensor("image", "TYPE_STRING", [1])
_TEXT_IN = tensor("text", "TYPE_STRING", [1])
_TOKENS_IN = tensor("max_tokens", "TYPE_INT32", [1], optional=True)
_TASKS: dict[str, tuple[Ability, str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "embed_image": ("embed", "image_embed", [_IMAGE_IN], [tensor("embedding", "TYPE_FP32", [])]),
    "embed_text": ("embed", "text_embed", [_TEXT_IN], [tensor("embedding", "TYPE_FP32", [])]),
    "match": ("match", "itm_logits", [_IMAGE_IN, _TEXT_IN], [tensor("probability", "TYPE_FP32", [1])]),
    "caption": (
        "caption",
        "logits",
        [_IMAGE_IN, tensor("prompt", "TYPE_STRING", [1], optional=True), _TOKENS_IN],
        [tensor("caption", "TYPE_STRING", [1])],
    ),
    "chat": (
        "chat",
        "logits",
        [
            tensor("question", "TYPE_STRING", [1]),
            tensor("image", "TYPE_STRING", [-1], optional=True),
            tensor("history", "TYPE_STRING", [1], optional=True),
            _TOKENS_IN,
        ],
        [
            tensor("answer", "TYPE_STRING", [1]),
            tensor("finish_reason", "TYPE_STRING", [1]),
            tensor("prompt_tokens", "TYPE_INT32", [1]),
            tensor("completion_tokens", "TYPE_INT32", [1]),
        ],
    ),
}
"""Task -> what it needs, the output whose component says how large its batches are, inputs, outputs."""

_DOCKERFILE = """# syntax=docker/dockerfile:1
# Triton with {project} {version}, which runs the models of the tasks.
FROM {image}
WORKDIR /srv
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --break-system-packages -r requirements.txt -c constraints.txt
COPY {wheel} ./
RUN pip install --no-cache-dir --break-system-packages --no-deps ./{wheel}
COPY {bundle}/ ./{bundle}/
COPY {models}/ ./{models}/
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 CMD {check}
CMD ["tritonserver", "--model-repository=/srv/{models}"]
"""
_PROBE = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=9)"
_README = """# {name}

{model} in {recipe}, as a model repository for Triton Inference Server.

```sh
docker build -t {name} .
docker run --rm {gpus}--shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 {name}
```

| model | inputs | outputs |
|---|---|---|
{rows}

An image is the bytes of its file (JPEG, PNG ...). Inputs in brackets may be left out. Each task is a process
with its own engines: `--model-control-mode=explicit --load-model=NAME` loads only some.
{notes}
```python
import numpy as np, tritonclient.http as triton

client = triton.InferenceServerClient("localhost:8000")
data = triton.InferInput("{input}", [1, 1], "BYTES")
data.set_data_from_numpy(np.array([[{value}]], object))
print(client.infer("{task}", [data]).as_numpy("{output}"))
```
"""


def files(job: Job) -> list[File]:
    """The repository and its image, without the bundle.

    Raises:
        CapabilityError: the bundle has no engines of the kind that was asked for.
        IntegrityError: a graph does not fit its component's contract.
    """
    settings = job.settings
    backend = _backend(job)
    device = "cuda" if backend == "tensorrt" else settings["device"]
    serving = Serving(device, settings["instances"], settings["delay"])
    tasks = list(_task_configs(job, backend, serving))
    parts: list[File] = []
    configs = list(tasks)
    for config in tasks:
        folder = f"{MODELS}/{config['name']}"
        parts.append(File(f"{folder}/1/model.py", Path(__file__).with_name("triton_model.py")))
    if settings["graphs"]:
        for name in job.bundle.manifest.components:
            own, engines = _component(job, name, backend, serving)
            configs += own
            parts += engines
    parts += [File(f"{MODELS}/{c['name']}/config.pbtxt", config_text(c)) for c in configs]
    # Triton wants the folder of a version for an ensemble, too, in which nothing is.
    parts += [File(f"{MODELS}/{c['name']}/1/.keep", "") for c in configs if "platform" in c]
    return [*parts, *_image(job, device, _notes(job, backend), tasks, configs)]


def _backend(job: Job) -> str:
    have = {engine.backend for engine in job.bundle.manifest.engines}
    wanted: str = job.settings["engines"]
    if wanted == "auto":
        return "tensorrt" if "tensorrt" in have else "onnxruntime"
    if wanted == "tensorrt" and "tensorrt" not in have:
        rtx = " Triton has no backend for those of TensorRT-RTX." if RTX in have else ""
        raise CapabilityError(
            "This bundle has no engines for Triton's TensorRT backend.",
            f"It has engines for {', '.join(sorted(have)) or 'ONNX Runtime on the CPU only'}.{rtx}",
            "Build it with --backend tensorrt on the GPU, or give -O engines=onnxruntime.",
        )
    return wanted


def _task_configs(job: Job, backend: str, serving: Serving) -> Iterator[dict[str, Any]]:
    engine = {"backend": backend}
    for task, (ability, output, inputs, outputs) in _TASKS.items():
        if ability not in job.abilities:
            continue
        spec = job.bundle.spec(job.gives(output))
        if ability == "embed":
            size = next(fixed(t.shape[1]) for t in spec.outputs if t.name == output)
            heads = ["embedding"]
            if task == "embed_image" and job.gives("query_embed"):
                heads.append("embedding_g")
            outputs = [tensor(name, "TYPE_FP32", [size]) for name in heads]
        yield {
            "name": task,
            "backend": "python",
            "max_batch_size": spec.axis("batch").max,
            "input": inputs,
            "output": outputs,
            # With KIND_GPU there are instances on every GPU; inputs still come in host memory.
            "instance_group": [serving.group],
            "dynamic_batching": {"max_queue_delay_microseconds": serving.delay},
            "parameters": parameters({"task": task, "bundle": f"../../{BUNDLE}", **engine}),
        }


def _component(
    job: Job, name: str, backend: str, serving: Serving
) -> tuple[list[dict[str, Any]], list[File]]:
    """Configurations and files of the models of a component: one, or its parts and their ensemble."""
    component = job.bundle.manifest.components[name]
    engines = job.bundle.engines(name, backend)
    pieces = component.parts if len(engines) > 1 else (component,)
    configs = [
        component_config(job.bundle, piece, engine, serving)
        for piece, engine in zip(pieces, engines, strict=True)
    ]
    parts = [
        file for config, engine in zip(configs, engines, strict=True) for file in _engine(job, config, engine)
    ]
    if len(configs) > 1:
        configs.append(ensemble_config(component, min(c["max_batch_size"] for c in configs), configs))
    return configs, parts


def _engine(job: Job, config: dict[str, Any], engine: EngineFile) -> Iterator[File]:
    """A plan; or a graph with its weights, in a folder as Triton has it for a model of several files."""
    source, folder = job.bundle.path(engine.file), f"{MODELS}/{config['name']}/1/{FILES[engine.backend]}"
    if engine.backend != "onnxruntime":
        yield File(folder, source)
        return
    graph, weights = with_own_weights(job.bundle, engine.file, WEIGHTS)
    yield File(f"{folder}/{FILES[engine.backend]}", graph)
    yield File(f"{folder}/{WEIGHTS}", weights)


def _notes(job: Job, backend: str) -> str:
    """What else the README has to say."""
    engines = job.bundle.manifest.engines
    notes = []
    if releases := sorted({engine.release for engine in engines if engine.backend == backend} - {""}):
        notes.append(
            f"The engines were built with {backend} {', '.join(releases)}: the image needs that release."
        )
    if any(engine.backend == RTX for engine in engines):
        notes.append("The bundle's engines of TensorRT-RTX are not served: Triton has no backend for them.")
    return "".join(f"\n{note}\n" for note in notes)


def _image(
    job: Job, device: str, notes: str, tasks: Sequence[dict[str, Any]], configs: Sequence[dict[str, Any]]
) -> list[File]:
    """What builds and explains the image that serves the repository."""
    manifest, first = job.bundle.manifest, tasks[0]
    entry = first["input"][0]["name"]
    words = {
        "project": PROJECT,
        "version": __version__,
        "image": job.settings.get("image") or DEFAULT_IMAGE,
        "wheel": WHEEL,
        "bundle": BUNDLE,
        "models": MODELS,
        "check": json.dumps(["python3", "-c", _PROBE]),
        "name": re.sub(r"[._-]+", "-", job.name.lower()).strip("-"),
        "model": manifest.model.name,
        "recipe": manifest.recipe,
        "gpus": "--gpus all " if device == "cuda" else "",
        "rows": "\n".join(map(_row, configs)),
        "notes": notes,
        "task": first["name"],
        "input": entry,
        "value": 'open("photo.jpg", "rb").read()' if entry == "image" else 'b"What is this?"',
        "output": first["output"][0]["name"],
    }
    target = environment(PYTHON)
    head = f"What {PROJECT} {__version__} needs, in the versions that it was tested with."
    return [
        File("Dockerfile", _DOCKERFILE.format(**words)),
        File("README.md", _README.format(**words)),
        File("requirements.txt", text_of(requirement_lines([EXTRAS[device]], target), head)),
        File("constraints.txt", text_of(constraint_lines(target), head)),
        File(WHEEL, write_wheel),
    ]


def _row(config: dict[str, Any]) -> str:
    def shown(side: str) -> str:
        names: dict[str, list[str]] = {}
        for t in config[side]:
            stem, dot, number = t["name"].rpartition(".")
            names.setdefault(f"{stem}.*" if dot and number.isdigit() else t["name"], []).append(t["name"])
        optional = {t["name"] for t in config[side] if t.get("optional")}
        return ", ".join(f"[`{name}`]" if name in optional else f"`{name}`" for name in names)

    return f"| `{config['name']}` | {shown('input')} | {shown('output')} |"


FORMAT = Format(
    "triton",
    "a model repository for Triton",
    {
        "device": DEVICE,
        "image": IMAGE,
        "engines": ENGINES,
        "graphs": GRAPHS,
        "instances": INSTANCES,
        "delay": DELAY,
    },
    files,
)
