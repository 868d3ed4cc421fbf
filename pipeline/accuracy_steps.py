"""Steps that measure the loss of accuracy: of the components, and on the tasks of an evaluation set."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..arrays import Array
from ..bundle import Bundle
from ..bundle.manifest import Component, FileEntry, Manifest
from ..calibration.accuracy import SIMULATED, Metrics, Receipt, Table, component_accuracy
from ..calibration.calibrate import calibration_units
from ..calibration.component_chain import Step as ChainStep
from ..calibration.dataset import Batch
from ..calibration.magnitudes import Magnitudes, check_magnitudes
from ..calibration.recording import Recording, recorded_bytes
from ..dtypes import dtype_of
from ..engines.base import open_engine
from ..engines.memory import available_memory
from ..export.unquantized import weight_keys
from ..files.cache_dir import cache_folder
from ..files.hashing import sha256_json
from ..files.write import atomic
from ..inputs.preprocess import preprocess_images
from ..inputs.tokenizer import CAPTION_PROMPT
from ..models.registry import CHAT, component_spec, family_of
from ..quantization.algorithms import depends_on_type
from ..quantization.recipe import load_recipe, plan_layers
from ..quantization.schemes import folded_layers
from ..runtime.zero_shot import l2
from ..synthetic.tasks import BothHeads
from .config import ORT
from .environment import code_digest, tool_versions
from .graph_steps import (
    BASE_STORE,
    LOW_STORE,
    GraphSource,
    component_weights,
    graph_path,
    graph_source,
    write_base_store,
    write_graph,
    write_quantised_store,
)
from .manifest import manifest_of
from .plan import SIGNS, BuildPlan
from .workspace import Step, StepResult, Workspace, after, write_receipt

if TYPE_CHECKING:
    from ..calibration.simulate import Simulated
    from ..models.checkpoint import Checkpoint
    from ..runtime import InternVL
    from ..synthetic.captions import Language

QUESTIONS = {"n_classify": 500, "n_retrieve": 200, "n_galleries": 2, "n_caption": 250, "n_caption_zh": 50}
CHAT_QUESTIONS = {"scenes": 200}
SIGN_QUESTIONS = {"questions": 300}
"""Questions of the tasks: of an InternVL, of a chat model (scenes, with one or two each), and about signs."""
HEADLINES = {
    "C classify": ("InternVL-C", "classify"),
    "C text to image R@1": ("InternVL-C", "text_to_image"),
    "G classify": ("InternVL-G", "classify"),
    "G text to image R@1": ("InternVL-G", "text_to_image"),
    "caption exact": ("caption", "en"),
    "chat exact": ("chat", "all"),
    "signs exact": ("signs", "all"),
}
"""The figures that budgets are held to, and where :func:`..synthetic.tasks.evaluate` puts them."""
COMPARED = ("fp8", "int8")
"""Recipes whose task accuracy is compared with fp32, bf16 and the built recipe."""


def accuracy_step(plan: BuildPlan, before: list[Step]) -> Step:
    """Every component against fp32, on held-out samples.

    The graphs are run in fp32: whether the base type holds their values is judged by the magnitudes that
    the fp32 model reached, and a type that does not is refused.
    """

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        source = graph_source(plan, space.staging_dir)
        receipt = component_receipt(plan, source, space, advanced)
        ranges = source.ranges.amax if source.ranges else {}
        check_magnitudes(receipt.magnitudes, plan.recipe.base, ranges)
        return [write_receipt(space, "accuracy", receipt.to_json())], {}

    inputs = {"held_out": plan.held_out.hash, **after(before)}
    writes = recorded_bytes(plan.checkpoint.model, plan.components, len(plan.held_out))
    return Step("accuracy", inputs, run, receipt_units(plan), writes, "samples x blocks")


def tasks_step(plan: BuildPlan, preprocess: Step, before: list[Step]) -> Step:
    """Task accuracy in fp32, bf16, FP8, INT8 and the built recipe, all on the same questions."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        model, source = {**plan.identity, **after([preprocess])}, graph_source(plan, space.staging_dir)
        torch_scores = partial(evaluate_torch, plan)
        scores = {"fp32": cached([model, "fp32"], partial(torch_scores, "fp32"))}
        advanced(1)
        scores["bf16"] = cached([model, "bf16"], partial(torch_scores, "bf16"))
        if not plan.recipe.quantises:
            # ONNX Runtime computes these graphs in fp32: torch shows the loss by 16-bit arithmetic.
            base = plan.recipe.base
            run_base = partial(torch_scores, base)
            scores[plan.recipe.name] = cached([model, base], run_base)
        for count, other in enumerate(_compared(plan, source), 2):
            advanced(count)
            scores[other.recipe.name] = scores_of(plan, other, space, preprocess)
        return [write_receipt(space, "tasks", {"scores": scores, "sizes": question_counts(plan)})], {}

    return Step("tasks", {"sizes": question_counts(plan), **after([preprocess, *before])}, run, 5)


def scores_of(plan: BuildPlan, source: GraphSource, space: Workspace, preprocess: Step) -> dict[str, Any]:
    """Task scores of the graphs of ``source``, computed once for all builds."""
    rules = {k: v for k, v in source.recipe.to_json().items() if k != "summary"}
    model = {**plan.identity, **after([preprocess])}
    key = [model, rules, asdict(source.ranges) if source.ranges else None]
    return cached(key, partial(_graph_scores, plan, source, space))


def graph_manifest(plan: BuildPlan, manifest: Manifest, root: Path) -> Manifest:
    """``manifest`` with the files that are in ``root``, unhashed: enough to run them from there."""
    files = {
        p.relative_to(root).as_posix(): FileEntry("", p.stat().st_size)
        for p in root.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    components = {
        c: Component(component_spec(c, plan.checkpoint.model), {"fp32": graph_path(c, "fp32").as_posix()})
        for c in plan.components
    }
    return replace(manifest, components=components, engines=(), files=files)


def _compared(plan: BuildPlan, source: GraphSource) -> list[GraphSource]:
    """The built recipe, if it quantises, and the other quantised recipes on the same ranges."""
    if not plan.recipe.quantises:
        return []
    if folded_layers(plan.layers.schemes):
        return [source]  # the others would run on folded weights too
    if source.ranges is None or depends_on_type(source.ranges.algorithm):
        return [source]  # the others need ranges that were not measured
    recipes = [load_recipe(n) for n in COMPARED if n != plan.recipe.name]
    return [source, *(replace(source, recipe=r, layers=plan_layers(r, plan.linear_shapes)) for r in recipes)]


def _graph_scores(plan: BuildPlan, source: GraphSource, space: Workspace) -> dict[str, Any]:
    blank = manifest_of(plan, {}, ())
    if source.recipe == plan.recipe:
        manifest = graph_manifest(plan, blank, space.staging_dir)
        return evaluate_engines(space.staging_dir, manifest, plan.evaluation)
    with tempfile.TemporaryDirectory(dir=space.work_dir) as folder:
        root = Path(folder)
        keys, layers = component_weights(source, plan.components)
        write_base_store(source, keys, root)
        write_quantised_store(source, layers, root)
        for component in plan.components:
            write_graph(source, component, root, "fp32", "onnxruntime")
        shutil.copytree(space.staging_dir / "preprocess", root / "preprocess")
        return evaluate_engines(root, graph_manifest(plan, blank, root), plan.evaluation)


def component_receipt(
    plan: BuildPlan,
    source: GraphSource,
    space: Workspace,
    progress: Callable[[int], None],
    simulate: bool | None = None,
) -> Receipt:
    """Cosine and SQNR of every component's fp32-computing graph against fp32 torch, on held-out samples.

    The graphs run in ONNX Runtime where memory holds them, or else are simulated in torch block by block. The
    fp32 model runs block by block in both cases.

    Args:
        plan: of the build.
        source: checkpoint, recipe and ranges of the graphs.
        space: workspace with the graphs; the fp32 activations are spilled there.
        progress: called with how much of :func:`receipt_units` is done.
        simulate: whether to simulate; None: if the graphs take over half of the free memory.
    """
    if simulate is None:
        simulate = bool(no_session(plan.checkpoint, plan.components))
    blocks: dict[str, list[Metrics]] = {}
    with tempfile.TemporaryDirectory(dir=space.work_dir, prefix="accuracy-") as folder:
        if simulate:
            simulated = _simulated(plan, source, space, Path(folder), progress)
            forced, chained, blocks = simulated.teacher_forced, simulated.chained, simulated.blocks
            magnitudes = simulated.magnitudes
        else:
            forced, chained, magnitudes = _in_onnxruntime(plan, space, Path(folder), progress)
    return Receipt(
        plan.recipe.name,
        SIMULATED if simulate else ORT,
        plan.held_out.hash,
        len(plan.held_out),
        plan.held_out.samples != plan.calibration.samples,
        forced,
        chained,
        blocks,
        magnitudes,
    )


def _simulated(
    plan: BuildPlan, source: GraphSource, space: Workspace, folder: Path, progress: Callable[[int], None]
) -> Simulated:
    from ..calibration.simulate import Quantised, simulated_accuracy

    stores = [p for rel in (BASE_STORE, LOW_STORE) if (p := space.staging_dir / rel).is_file()]
    quantised = Quantised(
        stores, source.layers.quantised, source.recipe.base, source.ranges, source.layers.attention
    )
    inputs = (plan.checkpoint, plan.components, quantised, plan.held_out, plan.settings, plan.tokenizer)
    return simulated_accuracy(*inputs, folder, progress=progress)


def _in_onnxruntime(
    plan: BuildPlan, space: Workspace, folder: Path, progress: Callable[[int], None]
) -> tuple[Table, Table, Magnitudes]:
    config = plan.checkpoint.model
    base = calibration_units(config, plan.components, len(plan.held_out))
    inputs = (plan.checkpoint, plan.components, plan.held_out, plan.settings, plan.tokenizer)
    recording = Recording(*inputs, folder, progress=progress)

    def reference() -> Iterator[tuple[Batch, list[ChainStep]]]:
        samples_done = base
        for batch, steps in recording:
            yield batch, steps
            samples_done += batch.size
            progress(samples_done)

    paths = {c: space.staging_dir / graph_path(c, "fp32") for c in plan.components}
    engines = {c: open_engine(ORT, component_spec(c, config), path) for c, path in paths.items()}
    try:
        runners = {name: engine.run for name, engine in engines.items()}
        return *component_accuracy(reference(), runners, config), recording.magnitudes
    finally:
        for engine in engines.values():
            engine.close()


def session_bytes(checkpoint: Checkpoint, components: Iterable[str]) -> int:
    """Memory that ONNX Runtime takes for the weights of ``components``: each has its own, in fp32."""
    tensors = checkpoint.tensors
    keys = (key for component in components for key in weight_keys(checkpoint, [component]))
    return sum(4 * math.prod(tensors[key].shape) for key in keys)


def no_session(checkpoint: Checkpoint, components: Iterable[str]) -> str:
    """Why ONNX Runtime cannot open the graphs of ``components`` here; empty if it can.

    Their weights may take half of the free memory: optimising a graph takes room too.
    """
    needed, free = session_bytes(checkpoint, components), available_memory()
    if free is None or 2 * needed <= free:
        return ""
    return f"ONNX Runtime would hold {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free"


def receipt_units(plan: BuildPlan) -> int:
    """Total that the progress of :func:`component_receipt` reaches."""
    count = len(plan.held_out)
    return calibration_units(plan.checkpoint.model, plan.components, count) + count


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


def evaluate_torch(plan: BuildPlan, dtype: str) -> dict[str, Any]:
    """Task scores of the PyTorch model in ``dtype`` (``fp32``, ``bf16``, ``fp16``)."""
    from ..models.load import load_torch
    from ..training.products import ProductsInFp32

    with ProductsInFp32():
        return evaluate_module(plan, load_torch(plan.checkpoint, dtype_of(dtype).torch), QUESTIONS)


def evaluate_module(plan: BuildPlan, model: Any, questions: Mapping[str, int]) -> dict[str, Any]:
    """Task scores of a PyTorch model of the plan's form; ``questions`` of the tasks of an InternVL."""
    from ..synthetic import chat_tasks, sign_tasks, tasks
    from ..training.chat_model import TorchChat
    from ..training.evaluate import TorchModel
    from ..training.tiles_model import TorchSigns

    if family_of(plan.checkpoint.model).form == CHAT:
        if plan.evaluation == SIGNS:
            signs = TorchSigns(model, tokenizer=plan.tokenizer)
            return sign_tasks.evaluate(signs, SIGN_QUESTIONS["questions"])
        answer = TorchChat(model, plan.tokenizer, plan.settings)
        return chat_tasks.evaluate(answer, CHAT_QUESTIONS["scenes"])
    return tasks.evaluate(TorchModel(model, plan.tokenizer, plan.settings), **cast(Any, questions))


def evaluate_engines(root: Path, manifest: Manifest, evaluation: str | None) -> dict[str, Any]:
    """Task scores of the graphs below ``root``, through the runtime and ONNX Runtime."""
    from ..evaluation.chat import EngineChat
    from ..runtime import InternVL, InternVLChat
    from ..runtime.components import Components
    from ..runtime.load import model_on
    from ..synthetic import chat_tasks, sign_tasks, tasks

    bundle = Bundle(root, manifest)
    with model_on(bundle, Components(bundle, ORT)) as model:
        if isinstance(model, InternVLChat):
            if evaluation == SIGNS:
                return sign_tasks.evaluate(EngineChat(model).signs, SIGN_QUESTIONS["questions"])
            return chat_tasks.evaluate(EngineChat(model), CHAT_QUESTIONS["scenes"])
        return tasks.evaluate(EngineModel(cast(InternVL, model)), **cast(Any, QUESTIONS))


def question_counts(plan: BuildPlan) -> dict[str, int]:
    """Questions of each task of the plan's model."""
    if plan.evaluation == SIGNS:
        return SIGN_QUESTIONS
    return CHAT_QUESTIONS if family_of(plan.checkpoint.model).form == CHAT else QUESTIONS


def headlines(scores: Mapping[str, Any]) -> dict[str, float]:
    """The accuracies (0..1) that budgets are held to."""
    places = ((name, *place) for name, place in HEADLINES.items() if place[0] in scores)
    return {name: scores[group][task]["accuracy"] for name, group, task in places}


def cached(content: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result that follows from ``content`` alone, kept for later builds of other bundles.

    The cache is ``$IVL_EXPORT_CACHE`` or ``ivl-export`` in the user's cache folder; without a folder to
    write to there is none.
    """
    parts = [content, QUESTIONS, CHAT_QUESTIONS, SIGN_QUESTIONS, tool_versions(), code_digest()]
    path = cache_folder() / "evaluations" / f"{sha256_json(parts)}.json"
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored
    except (OSError, ValueError):
        pass  # not there yet, or half a file of a full disk: made again below
    result = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, durable=True) as file:
            file.write_text(json.dumps(result), encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs time, not correctness
    return result
