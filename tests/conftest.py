"""Fixtures that several test files share."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

from ivl_export.files.locks import locked

# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)  # of `make check`
settings.load_profile("untimed")

# Tables fold at the width of the terminal, and xdist's workers pass for one of 80 columns.
os.environ["COLUMNS"] = "160"

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "goldens" / "tiny"
CHAT = ROOT / "tests" / "goldens" / "chat"
LIBRARIES = ("torch", "onnx", "onnxscript", "onnx-ir")


@pytest.fixture(scope="session", autouse=True)
def traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each graph is traced once, by whichever test and worker needs it first."""
    from ivl_export.export import trace
    from ivl_export.tests.tools.traces import kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "traced_graph", kept(request.config.cache.mkdir("traces"), trace.traced_graph))
        yield


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """A sealed bundle of the tiny golden model: fp32 graphs of all components, a small tokenizer.

    Its vision component gives the outputs of blocks 1 and 2 too. Tests must not change it.
    """
    pytest.importorskip("onnxscript")
    return shared(
        request, "tiny_bundle", build_tiny_bundle, *TINY.glob("*.safetensors"), TINY / "config.json"
    )


def shared(request: pytest.FixtureRequest, name: str, build: Callable[[Path], object], *inputs: Path) -> Path:
    """A bundle that ``build`` makes of ``inputs`` at a path, once for all tests, workers and runs.

    It is kept in pytest's cache under the hash of all it is made from: the package, this file, the inputs and
    the releases of the libraries.
    """
    digest = hashlib.sha256(" ".join(version(p) for p in LIBRARIES).encode() + package_digest().encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    folder = request.config.cache.mkdir(name)
    bundle = folder / digest.hexdigest()[:16] / "bundle"
    with locked(folder):  # xdist workers: one builds, the others wait
        if not bundle.exists():
            for old in folder.iterdir():
                shutil.rmtree(old, ignore_errors=True)
            bundle.parent.mkdir()
            build(bundle)
    return bundle


@cache
def package_digest() -> str:
    """The hash of the package's own files and of this one."""
    digest = hashlib.sha256()
    apart = ("tests", "benchmarks")
    for folder in sorted(p for p in ROOT.iterdir() if (p / "__init__.py").exists() and p.name not in apart):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".yaml", ".json")):
            digest.update(path.read_bytes())
    for path in (*sorted(ROOT.glob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny golden checkpoint with a tokenizer and a preprocessor. Tests must not change it."""
    from ivl_export.inputs.preprocess import ImageSettings

    folder = tmp_path_factory.mktemp("tiny_model")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "tokenizer.model").write_bytes(small_tokenizer())
    ImageSettings(size=56).save(folder / "preprocessor_config.json")
    return folder


@pytest.fixture(scope="session")
def chat_bundle(request: pytest.FixtureRequest) -> Path:
    """The golden chat checkpoint, sealed in fp32. Tests must not change it."""
    pytest.importorskip("onnxscript")
    return shared(
        request, "chat_bundle", build_chat_bundle, *CHAT.glob("*.safetensors"), *CHAT.glob("*.json")
    )


def build_chat_bundle(out: Path) -> None:
    from ivl_export.bundle import seal
    from ivl_export.bundle.manifest import Component, EngineFile, Manifest, Model
    from ivl_export.export.unquantized import export_plain
    from ivl_export.inputs.chat_template import ChatFormat
    from ivl_export.inputs.preprocess import ImageSettings
    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.registry import component_spec

    staging = out.with_name("staging")
    checkpoint = open_checkpoint(CHAT)
    exported = export_plain(checkpoint, staging / "onnx", dtype="fp32")
    (staging / "preprocess").mkdir()
    settings = ImageSettings.load(CHAT / "preprocessor_config.json")
    settings.save(staging / "preprocess" / "preprocessor_config.json")
    (staging / "preprocess" / "tokenizer.model").write_bytes(small_tokenizer(170))
    paths = {n: p.relative_to(staging).as_posix() for n, p in exported.graphs.items()}
    manifest = Manifest(
        model=Model(
            "chat",
            "goldens",
            {"checkpoint": checkpoint.revision},
            checkpoint.model.to_published(),
            0.0,
            1,
            ChatFormat(eos=(2,)).to_json(),
        ),
        recipe="fp32",
        compute_dtype="fp32",
        rules={},
        calibration=None,
        components={n: Component(component_spec(n, checkpoint.model), {"fp32": p}) for n, p in paths.items()},
        engines=tuple(EngineFile(n, "onnxruntime", "cpu", p, "", 0) for n, p in paths.items()),
    )
    seal(staging, manifest, out)


@pytest.fixture(scope="session")
def query_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small chat model whose tower has queries: made-up weights, a tokenizer, scenes.

    It reads 2 of InternViT's 3 blocks, on images of thrice the stored grid. Tests must not change it.
    """
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint
    from ivl_export.models.config import ChatConfig, InternVLConfig, QLlamaConfig, VisionConfig

    folder = tmp_path_factory.mktemp("query_chat")
    vision, qllama = VisionConfig(64, 3, 4, 128, 28, 14), QLlamaConfig(96, 2, 3, 192, vocab_size=200)
    tower = InternVLConfig(vision, qllama, clip_embed_dim=32, attn_pool_num_heads=4, num_query_token=6)
    make_checkpoint(folder, ChatConfig(tower, QLlamaConfig(128, 2, 4, 256, vocab_size=512), 84, -2), depth=3)
    return folder


def small_tokenizer(pieces: int = 190) -> bytes:
    """One for the tiny model, whose 200 ids leave no room for LLaMA's 256 byte pieces."""
    import sentencepiece

    from ivl_export.synthetic.captions import corpus

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=("".join(words) for words in corpus()), model_writer=model,
        model_type="bpe", vocab_size=pieces, pad_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def build_tiny_bundle(out: Path) -> None:
    from ivl_export.bundle import seal
    from ivl_export.bundle.manifest import Component, Manifest, Model
    from ivl_export.export.binding import bind, save_graph, unbound
    from ivl_export.export.cached_attention import separate_past
    from ivl_export.export.features import with_features
    from ivl_export.export.trace import export_component
    from ivl_export.export.weight_store import open_store
    from ivl_export.export.weights import write_store
    from ivl_export.inputs.preprocess import ImageSettings
    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.registry import component_spec
    from ivl_export.tests.components import OPTIONAL

    staging = out.with_name("staging")
    checkpoint = with_features(open_checkpoint(TINY), (1, 2))
    names = (*checkpoint.components, *OPTIONAL)
    graphs = {name: export_component(name, checkpoint, "fp32") for name in names}
    separate_past(graphs["qllama_step"])
    store = staging / "onnx" / "weights" / "model.safetensors"
    write_store(checkpoint, (key for graph in graphs.values() for key in unbound(graph)), store, "fp32")
    for name, graph in graphs.items():
        bind(graph, open_store(store), staging / "onnx")
        save_graph(graph, staging / "onnx" / f"{name}.fp32.onnx")
    (staging / "preprocess").mkdir()
    ImageSettings(size=checkpoint.config.vision.image_size).save(
        staging / "preprocess" / "preprocessor_config.json"
    )
    (staging / "preprocess" / "tokenizer.model").write_bytes(small_tokenizer())
    manifest = Manifest(
        model=Model(
            "tiny",
            "tests/goldens/tiny",
            {"checkpoint": checkpoint.revision},
            checkpoint.config.to_published(),
            float(checkpoint.load("logit_scale")),
            sum(ref.nbytes for ref in checkpoint.tensors.values()) // 4,
        ),
        recipe="fp32",
        compute_dtype="fp32",
        rules={},
        calibration=None,
        components={
            name: Component(component_spec(name, checkpoint.config), {"fp32": f"onnx/{name}.fp32.onnx"})
            for name in graphs
        },
    )
    seal(staging, manifest, out)
