"""Any bundle to the model that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Verify
from .chat import InternVLChat
from .components import Components
from .image_batches import Reading
from .kv_cache import PREFIX_BYTES
from .loaded import Loaded, family_of_bundle


def load(
    bundle: Path | str | Bundle,
    backend: str = "onnxruntime",
    components: Iterable[str] | None = None,
    threads: int | None = None,
    target: str | None = None,
    batch: int | None = None,
    verify: Verify | None = "size",
    reading: Reading | None = None,
    share_weights: bool | None = None,
    device: str | None = None,
    provider: str | None = None,
    dtype: str | None = None,
    compile: bool | str | None = None,
    cuda_graphs: bool | None = None,
    backend_options: Mapping[str, Any] | None = None,
    kept_bytes: int = PREFIX_BYTES,
) -> Any:
    """Open a bundle: an :class:`.InternVL`, an :class:`.InternVLChat`, or the class of another family.

    Use the model as a context manager, or call ``close()``, to free its engines.

    Args:
        bundle: its folder, or the result of :func:`ivl_export.build`.
        backend: whose engines to run: ``onnxruntime``, ``tensorrt-rtx``, ``tensorrt``, ``torch`` or
            ``torch-tensorrt``.
        components: opened now; the others (None: all) are opened when they are first used.
        threads: of each engine on the CPU; None: as many as there are cores.
        target: which engines of the backend (``sm89``); None: those for this machine's GPU, else the first.
        batch: images run at once; None: on the CPU the batch the engines were tuned for, else the most they
            take.
        verify: check of the bundle's files: ``size``, ``hash`` (reads them all), or None.
        reading: how images are read; None: on all cores, exactly as published, nothing fetched.
        share_weights: whether ONNX Runtime's sessions on the CPU map one copy of the weights that several
            components have; None: where that saves 64 MiB, and there is room in the cache folder.
        device: ``cpu``, ``cuda``, ``cuda:1``; None: the CPU with ``onnxruntime`` and ``torch``, else the
            first GPU.
        provider: of ``onnxruntime`` on a GPU: ``cuda`` or ``tensorrt``; None: ``cuda``.
        dtype: of ``torch``: ``fp32``, ``bf16`` or ``fp16``; None: fp32 on the CPU, else the bundle's.
        compile: of ``torch``: whether blocks are compiled, or the mode of ``torch.compile``.
        cuda_graphs: of ``torch`` and the TensorRTs: whether calls are recorded once for each shape and
            replayed.
        backend_options: further options of the backend's engines, by name.
        kept_bytes: memory for data that conversations of a chat share (embeddings of images, keys and values
            of their first positions); 0: nothing is shared. Of an InternVL it means nothing.

    Raises:
        UsageError: an unknown backend, or an option that it does not have.
        IntegrityError: the bundle is damaged.
        CapabilityError: it has no such component or engine, the backend is not installed, or weights cannot
            be shared though they were to be.
    """
    root = bundle.root if isinstance(bundle, Bundle) else bundle
    arguments: dict[str, Any] = {
        "backend": backend,
        "components": components,
        "threads": threads,
        "target": target,
        "batch": batch,
        "verify": verify,
        "reading": reading,
        "share_weights": share_weights,
        "device": device,
        "provider": provider,
        "dtype": dtype,
        "compile": compile,
        "cuda_graphs": cuda_graphs,
        "backend_options": backend_options,
    }
    model = model_class(Bundle.open(root, None))
    if issubclass(model, InternVLChat):
        arguments["kept_bytes"] = kept_bytes
    return model.load(root, **arguments)


def model_on(bundle: Bundle, components: Components) -> Loaded:
    """The model of an opened bundle on engines that are opened elsewhere."""
    return model_class(bundle)(bundle, components)


def model_class(bundle: Bundle) -> type[Loaded]:
    """The class that runs a bundle's family; CheckpointError for a family that is not known here."""
    module, _, name = family_of_bundle(bundle).runtime.partition(":")
    cls: type[Loaded] = getattr(import_module(f".{module}", __package__), name)
    return cls
