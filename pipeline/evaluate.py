"""Accuracy steps: components against fp32, and the tasks of a model that has an evaluation set."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..bundle import Bundle
from ..bundle.manifest import Manifest
from ..calibration.accuracy import SIMULATED, Metrics, Receipt, Table, component_accuracy
from ..calibration.calibrate import calibration_units
from ..calibration.chat import ChatBatch
from ..calibration.component_chain import Step
from ..calibration.dataset import Batch
from ..calibration.recording import Recording
from ..engines.base import open_engine
from ..engines.memory import available_memory
from ..export.components import component_spec
from ..export.unquantized import weight_keys
from ..files.cache_dir import cache_folder
from ..files.hashing import sha256_json
from ..files.write import atomic
from ..inputs.preprocess import Array, preprocess_images
from ..inputs.tokenizer import CAPTION_PROMPT
from ..models.config import ChatConfig
from ..models.storage import ITEM_BYTES
from ..runtime.zero_shot import l2
from ..synthetic.tasks import BothHeads
from . import evaluate_chat
from .environment import code_digest, tool_versions
from .graphs import BASE_STORE, LOW_STORE, Source, graph_path
from .job import Job
from .request import ORT
from .workspace import Workspace

if TYPE_CHECKING:
    from ..calibration.simulate import Simulated
    from ..models.checkpoint import Checkpoint
    from ..runtime import InternVL
    from ..synthetic.captions import Language

SIZES = {"n_classify": 500, "n_retrieve": 200, "n_galleries": 2, "n_caption": 250, "n_caption_zh": 50}
HEADLINES = {
    "C classify": ("InternVL-C", "classify"),
    "C text to image R@1": ("InternVL-C", "text_to_image"),
    "G classify": ("InternVL-G", "classify"),
    "G text to image R@1": ("InternVL-G", "text_to_image"),
    "caption exact": ("caption", "en"),
    "chat exact": ("chat", "all"),
}
"""The figures that budgets are held to, and where :func:`..synthetic.tasks.evaluate` puts them."""


def component_receipt(
    job: Job, source: Source, space: Workspace, progress: Callable[[int], None], simulate: bool | None = None
) -> Receipt:
    """Cosine and SQNR of every component's fp32-computing graph against fp32 torch, on held-out samples.

    The graphs run in ONNX Runtime where memory holds them, or else are simulated in torch block by block. The
    fp32 model runs block by block in both cases.

    Args:
        job: the build.
        source: what the graphs were made from.
        space: holds them, and the fp32 activations meanwhile.
        progress: hears how much of :func:`receipt_units` is done.
        simulate: whether to simulate; None: if the graphs take over half of the free memory.
    """
    if simulate is None:
        simulate = bool(no_session(job.checkpoint, job.components))
    blocks: dict[str, list[Metrics]] = {}
    with tempfile.TemporaryDirectory(dir=space.home, prefix="accuracy-") as folder:
        if simulate:
            found = _simulated(job, source, space, Path(folder), progress)
            forced, chained, blocks = found.teacher_forced, found.chained, found.blocks
        else:
            forced, chained = _in_onnxruntime(job, space, Path(folder), progress)
    return Receipt(
        job.recipe.name,
        SIMULATED if simulate else ORT,
        job.held_out.hash,
        len(job.held_out),
        job.held_out is not job.calibration,
        forced,
        chained,
        blocks,
    )


def _simulated(
    job: Job, source: Source, space: Workspace, folder: Path, progress: Callable[[int], None]
) -> Simulated:
    from ..calibration.simulate import Quantised, simulated_accuracy

    stores = [p for rel in (BASE_STORE, LOW_STORE) if (p := space.root / rel).is_file()]
    quantised = Quantised(
        stores, source.plan.quantised, source.recipe.base, source.scales, source.plan.attention
    )
    inputs = (job.checkpoint, job.components, quantised, job.held_out, job.settings, job.tokenizer)
    return simulated_accuracy(*inputs, folder, progress=progress)


def _in_onnxruntime(
    job: Job, space: Workspace, folder: Path, progress: Callable[[int], None]
) -> tuple[Table, Table]:
    config = job.checkpoint.whole
    base = calibration_units(config, job.components, len(job.held_out))
    inputs = (job.checkpoint, job.components, job.held_out, job.settings, job.tokenizer)
    recording = Recording(*inputs, folder, progress=progress)

    def reference() -> Iterator[tuple[Batch | ChatBatch, list[Step]]]:
        done = base
        for batch, steps in recording:
            yield batch, steps
            done += len(batch.pixel_values)
            progress(done)

    paths = {c: space.root / graph_path(c, "fp32") for c in job.components}
    engines = {c: open_engine(ORT, component_spec(c, config), path) for c, path in paths.items()}
    try:
        return component_accuracy(reference(), {name: engine.run for name, engine in engines.items()})
    finally:
        for engine in engines.values():
            engine.close()


def session_bytes(checkpoint: Checkpoint, components: Iterable[str]) -> int:
    """Memory that ONNX Runtime takes for the weights of ``components``: each has its own, in fp32."""
    tensors = checkpoint.tensors
    keys = (key for component in components for key in weight_keys(checkpoint, [component]))
    return sum(4 * tensors[key].nbytes // ITEM_BYTES[tensors[key].dtype] for key in keys)


def no_session(checkpoint: Checkpoint, components: Iterable[str]) -> str:
    """Why ONNX Runtime cannot open the graphs of ``components`` here; empty if it can.

    Their weights may take half of the free memory: optimising a graph takes room too.
    """
    needed, free = session_bytes(checkpoint, components), available_memory()
    if free is None or 2 * needed <= free:
        return ""
    return f"ONNX Runtime would hold {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free"


def receipt_units(job: Job) -> int:
    """What the progress of :func:`component_receipt` counts to."""
    count = len(job.held_out)
    return calibration_units(job.checkpoint.whole, job.components, count) + count


class EngineModel(BothHeads):
    """A bundle's engines as the evaluation tasks know a model."""

    def __init__(self, model: InternVL) -> None:
        super().__init__(self._both)
        self.model = model

    def _both(self, images: Array) -> dict[str, Array]:
        pixels = preprocess_images(list(images), self.model.image_settings)
        out = self.model.components.run("vision", {"pixel_values": pixels}, ["image_embed", "tokens"])
        query = self.model.components.run("qllama_query", {"tokens": out["tokens"]}, ["query_embed"])
        embed = out["image_embed"]
        return {"InternVL-C": embed, "InternVL-G": l2(embed) + l2(query["query_embed"])}

    def encode_text(self, texts: Sequence[str]) -> Array:
        """Embeddings [B, E]."""
        return self.model.encode_text(texts)

    def caption(self, images: Array, lang: Language) -> list[str]:
        """Greedy captions."""
        return self.model.caption(list(images), CAPTION_PROMPT[lang])


def evaluate_torch(job: Job, dtype: str) -> dict[str, Any]:
    """Task scores of the PyTorch model in ``dtype`` (``float32``, ``bfloat16``)."""
    if isinstance(job.checkpoint.model, ChatConfig):
        return evaluate_chat.evaluate_torch(job, dtype)
    import torch

    from ..models.load import load_model
    from ..synthetic import tasks
    from ..training.evaluate import TorchModel

    model = load_model(job.checkpoint, getattr(torch, dtype))
    return tasks.evaluate(TorchModel(model, job.tokenizer, job.settings), **cast(Any, SIZES))


def evaluate_engines(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Task scores of the graphs below ``root``, through the runtime and ONNX Runtime."""
    from ..runtime import InternVL, InternVLChat
    from ..runtime.components import Components
    from ..synthetic import tasks

    bundle = Bundle(root, manifest)
    if "decoder" in manifest.components:
        with InternVLChat(bundle, Components(bundle, ORT)) as chat:
            return evaluate_chat.evaluate_engines(chat)
    with InternVL(bundle, Components(bundle, ORT)) as model:
        return tasks.evaluate(EngineModel(model), **cast(Any, SIZES))


def sizes(job: Job) -> dict[str, int]:
    """How much the tasks of the job's model ask."""
    return evaluate_chat.SIZES if isinstance(job.checkpoint.model, ChatConfig) else SIZES


def headlines(scores: Mapping[str, Any]) -> dict[str, float]:
    """The accuracies (0..1) that budgets are held to."""
    found = ((name, *place) for name, place in HEADLINES.items() if place[0] in scores)
    return {name: scores[group][task]["accuracy"] for name, group, task in found}


def cached(content: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result that follows from ``content`` alone, kept for later builds of other bundles.

    The cache is ``$IVL_EXPORT_CACHE`` or ``ivl-export`` in the user's cache folder; without a folder to
    write to there is none.
    """
    parts = [content, SIZES, evaluate_chat.SIZES, tool_versions(), code_digest()]
    path = cache_folder() / "evaluations" / f"{sha256_json(parts)}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        pass  # not there yet, or half a file of a full disk: made again below
    result = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, durable=True) as partial:
            partial.write_text(json.dumps(result), encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs time, not correctness
    return result
