"""Opening a checkpoint of any published layout, checked against its config, tensors read one at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .config import InternVLConfig
from .layout import infer_config, is_ignored, published_key
from .registry import (
    ModelConfig,
    component_names,
    expected_shapes,
    family_of,
    load_config,
)
from .shipped import no_checkpoint
from .storage import TensorRef, check_tensors, open_reader
from .weight_files import read_file, read_folder

if TYPE_CHECKING:
    import torch

    from .weight_files import Reader

FULL_HASH_BYTES = 1 << 28
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: every tensor of its config is there, with the right shape.

    Args:
        path: the folder or file it was opened from.
        model: the model's sizes; their class says which kind of model it is.
        tensors: published key to the tensor's place.
    """

    path: Path
    model: ModelConfig
    tensors: dict[str, TensorRef]
    _readers: dict[Path, Reader] = field(default_factory=dict, repr=False, compare=False)

    @property
    def components(self) -> tuple[str, ...]:
        """The components this checkpoint has weights for, without the optional ones."""
        return component_names(self.model)

    @property
    def config(self) -> InternVLConfig:
        """The sizes of an InternVL; CheckpointError for any other family."""
        if isinstance(self.model, InternVLConfig):
            return self.model
        raise CheckpointError(
            f"{self.path} is not an InternVL-C or InternVL-G.",
            f"It is {family_of(self.model).title}.",
            "Give the checkpoint of an InternVL-C or InternVL-G.",
        )

    def has(self, component: str) -> bool:
        """Whether ``component`` can be made from this checkpoint."""
        return component in component_names(self.model, optional=True)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notices about this checkpoint, to show the user: unknown keys of its config."""
        keys = self.model.unknown_keys
        if not keys:
            return ()
        listed = f"{', '.join(keys[:12])}{f' and {len(keys) - 12} more' if len(keys) > 12 else ''}"
        return (f"The checkpoint's config.json has keys that are not known here, and not read: {listed}.",)

    def load(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """One tensor by its published key, in ``dtype`` (None: as stored).

        Without a change of dtype or device the result is a view of the mapped file (private: writing to it
        never reaches the file).
        """
        return self._read(self._ref(key)).to(device=device, dtype=dtype)

    def file_bytes(self, key: str) -> memoryview:
        """The stored bytes of a tensor, contiguous; a view of the mapped file where it is stored so."""
        import torch

        tensor = self.load(key).detach().contiguous().reshape(-1)
        data: memoryview = tensor.view(torch.uint8).numpy().data
        return data

    @cached_property
    def revision(self) -> str:
        """Identity of config and weights, 64 hex digits; the same however the tensors are split over files.

        SHA-256 over the config and, for every key in order, name, dtype, shape and bytes. Above 256 MiB only
        the first, middle and last 4 KiB of each tensor are read, so that 27 GB take seconds: another training
        run changes every such sample, but single flipped bits pass. File hashes find those.
        """
        full = sum(r.nbytes for r in self.tensors.values()) <= FULL_HASH_BYTES
        identity = family_of(self.model).identity(self.model)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for key in sorted(self.tensors):
            ref = self.tensors[key]
            digest.update(json.dumps([key, ref.dtype, ref.shape, ref.nbytes]).encode())
            data = self.file_bytes(key)
            if full or ref.nbytes <= 3 * SAMPLE_BYTES:
                digest.update(data)
                continue
            for start in (0, (ref.nbytes - SAMPLE_BYTES) // 2, ref.nbytes - SAMPLE_BYTES):
                digest.update(data[start : start + SAMPLE_BYTES])
        return digest.hexdigest()

    def _read(self, ref: TensorRef) -> torch.Tensor:
        if ref.view is not None:
            return ref.view.read(ref.shape, self._read)
        reader = self._readers.get(ref.file)
        if reader is None:
            reader = self._readers[ref.file] = open_reader(ref.file)
        return reader(ref.name)

    def _ref(self, key: str) -> TensorRef:
        try:
            return self.tensors[key]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {key}.", "No such tensor.") from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint and check every name, shape and type; no weights are read.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors``, ``pytorch_model.bin`` or the index of
            their shards: an InternVL, an InternViT alone, or an InternVL-Chat, whose vision tower may be a
            separate checkpoint (see :func:`.registry.load_config`). Or one older ``internvl_c`` file
            (``.pth``), whose sizes come from a ``config.json`` next to it or else from its tensors (see
            :func:`.layout.infer_config` for the assumptions).

    Raises:
        CheckpointError: files or tensors missing, surplus, twice, truncated, of a wrong shape or type; a
            config that is not InternVL's. Rotary frequency buffers are the only surplus let through.
    """
    path = Path(path)
    if path.is_file():
        return _open_older(path)
    if not path.is_dir():
        raise no_checkpoint(path)
    config = load_config(path / "config.json")
    readers: dict[Path, Reader] = {}
    source, stored = read_folder(path, readers)
    named_tensors = {name: ref for name, ref in stored.items() if not is_ignored(name)}
    tensors = family_of(config).locate(config, named_tensors, path, readers)
    check_tensors(source, tensors, expected_shapes(config))
    return Checkpoint(path, config, tensors, _readers=readers)


def load_state(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Give every parameter and persistent buffer of ``model`` its tensor, one at a time; tied ones share it.

    Args:
        model: any module whose state-dict names are published keys (a part of the model may be given: what
            the checkpoint has besides is left alone). Built on the meta device, so nothing exists twice.
        checkpoint: where the tensors come from.
        dtype: of the result; None keeps the stored type.
        device: of the result.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
    """
    import torch

    shared: dict[TensorRef, torch.Tensor] = {}
    for key, old in model.state_dict(keep_vars=True).items():
        tensor = shared.get(checkpoint.tensors[key]) if key in checkpoint.tensors else None
        tensor = checkpoint.load(key, dtype, device) if tensor is None else tensor
        if tensor.shape != old.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {key} has the wrong shape.",
                f"It is {list(tensor.shape)}, the model needs {list(old.shape)}.",
            )
        owner, _, leaf = key.rpartition(".")
        if isinstance(old, torch.nn.Parameter) and not isinstance(tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        shared[checkpoint.tensors[key]] = tensor
        setattr(model.get_submodule(owner), leaf, tensor)


def _open_older(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a checkpoint.", "Its config.json belongs to it.", f"Give {path.parent}."
        )
    readers: dict[Path, Reader] = {}
    tensors: dict[str, TensorRef] = {}
    for name, ref in read_file(path, readers).items():
        key = published_key(name)
        if key in tensors:
            raise CheckpointError(f"{path} holds {key} twice.", f"As {tensors[key].name} and as {name}.")
        if not is_ignored(name):
            tensors[key] = ref
    config_file = path.parent / "config.json"
    if config_file.is_file():
        config = InternVLConfig.load(config_file)
    else:
        config = infer_config({k: r.shape for k, r in tensors.items()}, str(path))
    config = replace(config, contrastive_only=True)
    check_tensors(path, tensors, expected_shapes(config))
    return Checkpoint(path, config, tensors, _readers=readers)
