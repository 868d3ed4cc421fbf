"""Fixtures that several test files share."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Tables fold at the width of the terminal, and xdist's workers pass for one of 80 columns.
os.environ["COLUMNS"] = "160"

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "goldens" / "tiny"
CHAT = ROOT / "tests" / "goldens" / "chat"


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

    Its vision component gives the outputs of blocks 1 and 2 too.

    Tracing takes most of a minute, so the bundle is kept in pytest's cache under the hash of all it is made
    from. Tests must not change it.
    """
    pytest.importorskip("onnxscript")
    digest = hashlib.sha256()
    sources = [
        ROOT / name for name in ("bundle/spec.py", "bundle/bundle.py", "bundle/manifest.py", "files/json.py")
    ]
    sources += [*(ROOT / "models").rglob("*.py"), *(ROOT / "export").glob("*.py")]
    for path in [*sorted(sources), Path(__file__), TINY / "config.json", TINY / "model.safetensors"]:
        digest.update(path.read_bytes())
    digest.update(" ".join(version(p) for p in ("torch", "onnx", "onnxscript", "onnx-ir")).encode())
    folder = request.config.cache.mkdir("tiny_bundle")
    bundle = folder / digest.hexdigest()[:16]
    with (folder / "lock").open("w") as lock:
        if os.name != "nt":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # xdist workers: one builds, the others wait
        if not bundle.exists():
            for old in folder.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            build_tiny_bundle(bundle)
    return bundle


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny golden checkpoint with a tokenizer and a preprocessor beside it. Tests must not change it."""
    from ivl_export.inputs.preprocess import ImageSettings

    folder = tmp_path_factory.mktemp("tiny_model")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "tokenizer.model").write_bytes(small_tokenizer())
    ImageSettings(size=56).save(folder / "preprocessor_config.json")
    return folder


@pytest.fixture(scope="session")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden chat checkpoint, sealed in fp32. Tests must not change it."""
    pytest.importorskip("onnxscript")
    from ivl_export.bundle import seal
    from ivl_export.bundle.manifest import Component, EngineFile, Manifest, Model
    from ivl_export.export.unquantized import export_plain
    from ivl_export.inputs.chat_template import ChatFormat
    from ivl_export.inputs.preprocess import ImageSettings
    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.registry import component_spec

    folder = tmp_path_factory.mktemp("chat")
    checkpoint = open_checkpoint(CHAT)
    exported = export_plain(checkpoint, folder / "staging" / "onnx", dtype="fp32")
    (folder / "staging" / "preprocess").mkdir()
    settings = ImageSettings.load(CHAT / "preprocessor_config.json")
    settings.save(folder / "staging" / "preprocess" / "preprocessor_config.json")
    (folder / "staging" / "preprocess" / "tokenizer.model").write_bytes(small_tokenizer(170))
    paths = {n: p.relative_to(folder / "staging").as_posix() for n, p in exported.graphs.items()}
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
    seal(folder / "staging", manifest, folder / "bundle")
    return folder / "bundle"


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

    staging = out.with_name(f"{out.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
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
