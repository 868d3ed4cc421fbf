"""The Triton repository: configurations parse as Triton's own protobuf and agree with graphs and engines;
models of the tasks run as they are shipped, on a stub of Triton's module, and give what the runtime gives."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ivl_export
from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import Built, Component, EngineFile, Manifest
from ivl_export.bundle.spec import TensorSpec
from ivl_export.cli import main
from ivl_export.engines.onnx_graph import read_graph
from ivl_export.errors import CapabilityError, IntegrityError, UsageError
from ivl_export.inputs.chat_template import Turn
from ivl_export.packages.own_weights import with_own_weights
from ivl_export.packages.triton_config import Word, check_contract, text
from ivl_export.runtime import ChatService
from ivl_export.tests.packages import triton_stub
from ivl_export.tests.packages.conftest import Pack
from ivl_export.tests.packages.test_docker import hadolint
from ivl_export.tests.packages.triton_stub import InferenceRequest, InferenceResponse, Tensor
from ivl_export.tests.sources import ROOT

DESCRIPTOR = ROOT / "tests" / "goldens" / "triton" / "model_config.descriptor"
NUMPY = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}


def parsed(config: str) -> Any:
    """A configuration as Triton's protobuf reads it; ParseError for what that does not know."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(DESCRIPTOR.read_bytes())
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    return text_format.Parse(config, message)


def configs(root: Path) -> dict[str, Any]:
    """Name of each model -> its configuration."""
    read = {path.parent.name: parsed(path.read_text()) for path in root.glob("models/*/config.pbtxt")}
    assert all(config.name == name for name, config in read.items())
    assert {path.name for path in (root / "models").iterdir()} == {*read}
    return read


def type_of(tensor: Any) -> str:
    return str(
        tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    )


@pytest.fixture(scope="module")
def made(
    tiny_bundle: Path, chat_bundle: Path, tmp_path_factory: pytest.TempPathFactory, wheel: Path
) -> Iterator[dict[str, Path]]:
    """The repositories of both bundles."""
    from ivl_export.packages import distribution

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "_build", lambda out: shutil.copyfile(wheel, out))
        root = tmp_path_factory.mktemp("triton")
        yield {
            name: ivl_export.package(bundle, root / name, format="triton", settings={"instances": 2}).root
            for name, bundle in (("tiny", tiny_bundle), ("chat", chat_bundle))
        }


@pytest.mark.parametrize("name", ["tiny", "chat"])
def test_a_model_for_each_graph_and_task(name: str, made: dict[str, Path]) -> None:
    root, bundle = made[name], Bundle.open(made[name] / "bundle")
    read = configs(root)
    tasks = {n for n, config in read.items() if config.backend == "python"}
    assert {*read} - tasks == {*bundle.manifest.components}
    assert tasks == ({"chat"} if name == "chat" else {"embed_image", "embed_text", "match", "caption"})
    for model, config in read.items():
        assert config.instance_group[0].count == 2
        assert config.max_batch_size >= 1
        if config.max_batch_size > 1:
            assert config.HasField("dynamic_batching")
            assert all(n <= config.max_batch_size for n in config.dynamic_batching.preferred_batch_size)
        if model in tasks:
            assert (root / "models" / model / "1" / "model.py").is_file()
    readme = (root / "README.md").read_text()
    assert all(f"| `{model}` |" in readme for model in read)


@pytest.mark.parametrize("name", ["tiny", "chat"])
def test_inputs_and_outputs_are_those_of_the_graphs_as_onnx_runtime_has_them(
    name: str, made: dict[str, Path]
) -> None:
    """Opened where Triton opens them: types, names and sizes, the batch left out."""
    ort = pytest.importorskip("onnxruntime")
    bundle = Bundle.open(made[name] / "bundle")
    for model, config in configs(made[name]).items():
        if config.backend != "onnxruntime":
            continue
        file = made[name] / "models" / model / "1" / config.default_model_filename / "model.onnx"
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for side, own in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            shapes = {t.name: [n if isinstance(n, int) else -1 for n in t.shape] for t in own}
            assert {t.name: [-1, *(() if t.HasField("reshape") else t.dims)] for t in side} == shapes
            assert all(list(t.dims) == [1] for t in side if t.HasField("reshape"))
            assert {t.name: NUMPY[type_of(t)] for t in side} == {t.name: t.type for t in own}
        assert config.max_batch_size == bundle.spec(model).axis("batch").max


def test_the_graph_of_the_repository_computes_what_the_bundle_does(
    made: dict[str, Path], photo: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    file = made["tiny"] / "models" / "vision" / "1" / "model.onnx" / "model.onnx"
    with ivl_export.load(made["tiny"] / "bundle", threads=1) as model:
        pixels = model.pixel_values([photo])
        (embed,) = ort.InferenceSession(str(file)).run(["image_embed"], {"pixel_values": pixels})
        np.testing.assert_allclose(embed, model.encode_image([photo]), rtol=1e-4, atol=1e-6)


class Model:
    """A model of the repository, loaded and called as Triton's Python backend does it."""

    def __init__(self, root: Path, name: str, **instance: str) -> None:
        self.config = parsed((root / "models" / name / "config.pbtxt").read_text())
        file = root / "models" / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location(f"triton_{name}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.TritonPythonModel()
        self.model.initialize({"model_config": self.json(), **instance})

    def json(self) -> str:
        """The configuration as Triton hands it over."""
        from google.protobuf import json_format

        return str(json_format.MessageToJson(self.config, preserving_proto_field_name=True))

    def request(self, outputs: list[str] | None = None, **inputs: Any) -> InferenceRequest:
        """Inputs as rows: a list of a text, bytes, a number, or a list of them for each row."""
        kinds = {t.name: type_of(t) for t in self.config.input}
        assert {t.name for t in self.config.input if not t.optional} <= {*inputs} <= {*kinds}
        tensors = []
        for name, rows in inputs.items():
            kind: Any = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32}[kinds[name]]
            array = np.array([row if isinstance(row, list) else [row] for row in rows], kind)
            tensors.append(_Input(name, array))
        return InferenceRequest(tensors, outputs or [t.name for t in self.config.output])

    def execute(self, *requests: InferenceRequest) -> list[InferenceResponse]:
        responses: list[InferenceResponse] = self.model.execute(list(requests))
        assert len(responses) == len(requests)
        for response in responses:
            for tensor in response.output_tensors():
                (declared,) = [t for t in self.config.output if t.name == tensor.name()]
                assert list(tensor.as_numpy().shape[1:]) == list(declared.dims)
        return responses

    def one(self, request: InferenceRequest) -> dict[str, Any]:
        """The outputs of a request that must not fail."""
        (response,) = self.execute(request)
        error = response.error()
        assert error is None, error
        return {t.name(): t.as_numpy() for t in response.output_tensors()}


class _Input(Tensor):
    """As Triton makes them: of any type that a client sends."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array


@contextmanager
def triton(root: Path, name: str) -> Iterator[Model]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", triton_stub)
        model = Model(root, name)
        try:
            yield model
        finally:
            model.model.finalize()


def pictures(count: int) -> list[bytes]:
    import io

    files = []
    for seed in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (30 + seed, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def said(response: InferenceResponse) -> str:
    error = response.error()
    assert error is not None
    assert not response.output_tensors()
    return error.message()


def test_embeddings_captions_and_matches_are_the_runtimes(made: dict[str, Path], tmp_path: Path) -> None:
    images, texts = pictures(3), ["a red ring", "two small crosses", "ein Ring"]
    encoded = [text.encode() for text in texts]
    with ivl_export.load(made["tiny"] / "bundle") as model:
        with triton(made["tiny"], "embed_image") as embed:
            one, two = embed.execute(
                embed.request(image=images[:2]), embed.request(["embedding"], image=images[2:])
            )
            heads = {t.name(): t.as_numpy() for t in one.output_tensors()}
            assert {*heads} == {"embedding", "embedding_g"}
            close: Any = {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(heads["embedding"], unit(model.encode_image(images[:2])), **close)
            np.testing.assert_allclose(
                heads["embedding_g"], unit(model.encode_image(images[:2], "InternVL-G")), **close
            )
            (tensor,) = two.output_tensors()
            np.testing.assert_allclose(tensor.as_numpy(), unit(model.encode_image(images[2:])), **close)

            # Bad inputs: a text, nothing, a path that is there. Others in the same batch are answered.
            secret = tmp_path / "secret.png"
            secret.write_bytes(images[0])
            bad = [b"no picture", b"", str(secret).encode(), images[0][:50]]
            responses = embed.execute(
                *(embed.request(image=[b]) for b in bad), embed.request(image=images[:1])
            )
            assert all("Cannot read" in said(r) or "damaged" in said(r) for r in responses[:-1])
            assert responses[-1].error() is None
            (both,) = embed.execute(embed.request(image=[images[0], b"no picture"]))
            assert said(both).startswith("Row 2 of 2: ")
            assert "Traceback" not in said(both)
        with triton(made["tiny"], "embed_text") as embed:
            rows = embed.one(embed.request(text=encoded))["embedding"]
            np.testing.assert_allclose(rows, unit(model.encode_text(texts)), rtol=1e-4, atol=1e-5)
            (wrong,) = embed.execute(embed.request(text=[b"\xff\xfe"]))
            assert said(wrong).startswith("text is not UTF-8")
        with triton(made["tiny"], "caption") as caption:
            rows = caption.one(caption.request(image=images))["caption"]
            assert [row[0].decode() for row in rows] == model.caption(images)
            asked = caption.request(image=images[:1], prompt=[b"a photo of"], max_tokens=[5])
            short = caption.one(asked)["caption"][0][0].decode()
            assert short == model.caption(images[:1], "a photo of", max_new_tokens=5)[0]
            (wrong,) = caption.execute(caption.request(image=images[:1], max_tokens=[0]))
            assert said(wrong)
        with triton(made["tiny"], "match") as match:
            rows = match.one(match.request(image=images, text=encoded))["probability"]
            np.testing.assert_allclose(rows[:, 0], model.match(images, texts), rtol=1e-3, atol=1e-5)


async def completed(model: Any, turns: list[Turn], images: list[bytes]) -> str:
    service = ChatService(model)
    try:
        pieces = [piece async for piece in service.complete(turns, images, max_new_tokens=8)]
        return "".join(piece for piece in pieces if isinstance(piece, str))
    finally:
        service.close()


def test_chats_are_the_runtimes(made: dict[str, Path]) -> None:
    images = pictures(2)
    history = [{"question": "What is it?", "answer": "A ring.", "images": 1}]
    with ivl_export.load(made["chat"] / "bundle") as model, triton(made["chat"], "chat") as chat:
        plain = chat.request(question=[b"What is this?"], image=[[images[0]]], max_tokens=[8])
        later = chat.request(
            question=[b"And now?"], image=[images], history=[json.dumps(history).encode()], max_tokens=[8]
        )
        bare = chat.request(["answer"], question=[b"Hello"], max_tokens=[8])
        answers = [
            {t.name(): t.as_numpy()[0] for t in response.output_tensors()}
            for response in chat.execute(plain, later, bare)
        ]
        assert answers[0]["answer"][0].decode() == model.chat(images[:1]).ask("What is this?", 8)
        turns = [Turn("What is it?", "A ring.", 1), Turn("And now?", None, 1)]
        assert answers[1]["answer"][0].decode() == asyncio.run(completed(model, turns, images)).strip()
        assert {*answers[2]} == {"answer"}
        assert answers[2]["answer"][0].decode() == model.chat().ask("Hello", 8)
        assert answers[0]["finish_reason"][0] in (b"stop", b"length")
        assert 1 <= answers[0]["completion_tokens"][0] <= 8
        assert answers[1]["prompt_tokens"][0] > answers[0]["prompt_tokens"][0]
        for wrong in (
            '{"a": 1}',
            "[1]",
            '[{"question": 1, "answer": "a"}]',
            '[{"question": "a"}]',
            "[",
            '[{"x": 1}]',
        ):
            (response,) = chat.execute(chat.request(question=[b"?"], history=[wrong.encode()]))
            assert said(response).startswith("The history cannot be read")
        (response,) = chat.execute(chat.request(question=[b"?"], history=[json.dumps(history).encode()]))
        assert "0 were sent" in said(response)
        (response,) = chat.execute(chat.request(question=[b"?"], max_tokens=[0]))
        assert "max_tokens" in said(response)


@pytest.mark.parametrize(("kind", "device"), [("GPU", "cuda:1"), ("CPU", None)])
def test_an_instance_runs_on_its_gpu(
    kind: str, device: str | None, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load(folder: Path, **engine: Any) -> None:
        asked.append({"folder": folder.resolve(), **engine})
        raise CapabilityError("There is no GPU here.")

    monkeypatch.setattr(ivl_export, "load", load)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stub)
    with pytest.raises(CapabilityError):
        Model(made["tiny"], "caption", model_instance_kind=kind, model_instance_device_id="1")
    expected = {"folder": (made["tiny"] / "bundle").resolve(), "backend": "onnxruntime"}
    assert asked == [expected if device is None else {**expected, "device": device}]


def test_a_fault_of_the_code_is_told_without_a_traceback(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with triton(made["tiny"], "embed_text") as embed:

        async def broken(*arguments: Any) -> None:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(embed.model, "task", broken)
        (response,) = embed.execute(embed.request(text=[b"a"]))
        assert said(response) == "An unexpected ZeroDivisionError; see the server's log."
        assert "ZeroDivisionError: secret" in capsys.readouterr().err


def changed(bundle: Path, out: Path, change: Callable[[Path, Manifest], Manifest]) -> Path:
    """A bundle like another, with another manifest and further files."""
    staging = out.with_name("staging")
    shutil.copytree(bundle, staging)
    seal(staging, change(staging, Bundle.open(bundle).manifest), out)
    return out


def with_engines(backend: str) -> Callable[[Path, Manifest], Manifest]:
    """Adds made-up engines of ``backend``: one of two profiles for each component."""

    def change(staging: Path, manifest: Manifest) -> Manifest:
        engines = list(manifest.engines)
        for name, component in manifest.components.items():
            file = f"engines/{backend}-native/{name}.engine"
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).write_bytes(b"plan of " + name.encode())
            axes = {a.name: (a.min, a.min, max(a.min, 1)) for a in component.spec.axes}
            profiles = tuple({**axes, "batch": (1, high, high)} for high in (2, 4))
            engines.append(
                EngineFile(name, backend, "native", file, "10.16.1", 0, Built("bf16", profiles, {}))
            )
        return replace(manifest, engines=tuple(engines))

    return change


def test_plans_of_tensorrt_are_served_by_its_backend(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = changed(tiny_bundle, tmp_path / "bundle", with_engines("tensorrt"))
    root = pack(bundle, "triton").root
    specs = Bundle.open(bundle).manifest.components
    for name, config in configs(root).items():
        if config.backend == "python":
            assert config.parameters["backend"].string_value == "tensorrt"
            continue
        assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
        assert (root / "models" / name / "1" / "model.plan").read_bytes() == b"plan of " + name.encode()
        assert not (root / "models" / name / "1" / "model.onnx").exists()
        assert config.max_batch_size == 4
        assert list(config.instance_group[0].profile) == ["0", "1"]
        kinds = {t.name: type_of(t) for t in (*config.input, *config.output)}
        contract = (*specs[name].spec.inputs, *specs[name].spec.outputs)
        assert kinds == {t.name: "TYPE_BF16" if t.dtype == "float" else "TYPE_INT64" for t in contract}
    assert "tensorrt 10.16.1" in (root / "README.md").read_text()
    onnx = pack(bundle, "triton", out=tmp_path / "onnx", settings={"engines": "onnxruntime"}).root
    assert {config.backend for config in configs(onnx).values()} == {"python", "onnxruntime"}


def test_engines_of_tensorrt_rtx_are_not_tritons(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = changed(tiny_bundle, tmp_path / "bundle", with_engines("tensorrt-rtx"))
    with pytest.raises(CapabilityError, match="no backend for those of TensorRT-RTX"):
        pack(bundle, "triton", settings={"engines": "tensorrt"})
    with pytest.raises(UsageError, match="Triton does not run"):
        pack(bundle, "triton", settings={"engines": "tensorrt-rtx"})
    root = pack(bundle, "triton").root
    assert {config.backend for config in configs(root).values()} == {"python", "onnxruntime"}
    assert "TensorRT-RTX are not served" in (root / "README.md").read_text()


def test_parts_of_a_split_component_run_as_an_ensemble(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    def split(staging: Path, manifest: Manifest) -> Manifest:
        whole = manifest.components["vision"]
        hidden = TensorSpec("hidden.1", "float", ("batch", 17, 64))
        first = replace(whole.spec, name="vision.0", outputs=(hidden,))
        second = replace(whole.spec, name="vision.1", inputs=(hidden,))
        parts = (Component(first, {}), Component(second, {}))
        engines = []
        for name in manifest.components:
            for part in range(2 if name == "vision" else 1):
                file = f"engines/tensorrt-native/{name}.{part}.engine"
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                (staging / file).write_bytes(b"plan")
                engines.append(
                    EngineFile(name, "tensorrt", "native", file, "10.16.1", part, Built("fp16", (), {}))
                )
        components = {**manifest.components, "vision": replace(whole, parts=parts)}
        return replace(manifest, components=components, engines=tuple(engines))

    read = configs(pack(changed(tiny_bundle, tmp_path / "bundle", split), "triton").root)
    steps = read["vision"].ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["vision.0", "vision.1"]
    assert read["vision"].platform == "ensemble"
    assert dict(steps[1].input_map) == {"hidden.1": "hidden.1"}
    known = {t.name for t in read["vision"].input}
    for step in steps:
        assert {*step.input_map.values()} <= known
        assert {*step.input_map} == {t.name for t in read[step.model_name].input}
        known |= {*step.output_map.values()}
    assert {t.name for t in read["vision"].output} <= known


def test_a_graph_that_is_not_the_contracts_is_refused(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    def other(staging: Path, manifest: Manifest) -> Manifest:
        vision = manifest.components["vision"]
        wrong = replace(vision, graphs=manifest.components["qllama_text"].graphs)
        return replace(manifest, components={**manifest.components, "vision": wrong})

    with pytest.raises(IntegrityError, match="is not the graph of vision"):
        pack(changed(tiny_bundle, tmp_path / "bundle", other), "triton")
    assert not (tmp_path / "package").exists()
    spec = Bundle.open(tiny_bundle).spec("vision")
    graph = read_graph(Bundle.open(tiny_bundle).graph("vision", "fp32"))
    check_contract(spec, graph, tmp_path)
    more = replace(graph, inputs={**graph.inputs, "mask": ("fp32", (0,))})
    with pytest.raises(IntegrityError, match="also takes mask"):
        check_contract(spec, more, tmp_path)


def test_graphs_may_be_left_out(pack: Pack, tiny_bundle: Path) -> None:
    package = pack(tiny_bundle, "triton", settings=["graphs=false", "device=cuda", "delay=0"])
    read = configs(package.root)
    assert {config.backend for config in read.values()} == {"python"}
    group = read["caption"].instance_group[0]
    assert group.Kind.Name(group.kind) == "KIND_GPU"
    assert "onnxruntime-gpu" in (package.root / "requirements.txt").read_text()


def test_each_graph_has_its_own_weights_and_no_others(made: dict[str, Path], tiny_bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for name in Bundle.open(tiny_bundle).manifest.components:
        folder = made["tiny"] / "models" / name / "1" / "model.onnx"
        assert {file.name for file in folder.iterdir()} == {"model.onnx", "weights.bin"}
        moved, first = onnx.load(folder / "model.onnx"), onnx.load(tiny_bundle / "onnx" / f"{name}.fp32.onnx")
        assert moved == first, "loaded with their weights"
        sizes = [len(tensor.raw_data) for tensor in moved.graph.initializer if len(tensor.raw_data) > 64]
        assert (
            sum(sizes) * 0.8 <= (folder / "weights.bin").stat().st_size <= sum(sizes) + 64 * len(sizes) + 4096
        )
    onnx.checker.check_model(str(made["tiny"] / "models" / "vision" / "1" / "model.onnx" / "model.onnx"))


def test_a_graph_that_cannot_be_read_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    def spoil(staging: Path, manifest: Manifest) -> Manifest:
        graph = staging / manifest.components["vision"].graphs["fp32"]
        graph.write_bytes(graph.read_bytes()[:-7])
        return manifest

    bundle = Bundle.open(changed(tiny_bundle, tmp_path / "bundle", spoil))
    with pytest.raises(IntegrityError, match="is not a valid ONNX model"):
        with_own_weights(bundle, bundle.manifest.components["vision"].graphs["fp32"], "weights.bin")


def test_the_image_lints(made: dict[str, Path]) -> None:
    assert hadolint(made["tiny"] / "Dockerfile") == []


def test_texts_of_messages_are_read_back_as_they_were() -> None:
    odd = 'a "b" \\ \n é'
    read = parsed(text({"name": odd, "max_batch_size": 3, "input": [
        {"name": odd, "data_type": Word("TYPE_FP32"), "dims": [-1, 3], "optional": True}
    ]}))  # fmt: skip
    assert (read.name, read.max_batch_size) == (odd, 3)
    assert (read.input[0].name, list(read.input[0].dims), read.input[0].optional) == (odd, [-1, 3], True)


def test_the_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "p")
    assert main(["package", str(tiny_bundle), "--format", "triton", "--out", out, "--dry-run"]) == 0
    assert "models/" in capsys.readouterr().out
    assert main(["package", str(tiny_bundle), "--format", "triton", "--out", out, "-O", "port=9000"]) == 2
    assert "no setting of --format triton 'port'" in capsys.readouterr().err
