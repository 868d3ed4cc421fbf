"""The files that hold a checkpoint's weights: one, or the shards that an index names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .layout import is_ignored
from .misfits import check_unquantised, explain_folder, explain_wrapper
from .storage import TensorRef, named, read_header, read_index, read_torch, torch_refs

if TYPE_CHECKING:
    import torch

    Reader = Callable[[str], torch.Tensor]

# In a folder, the first of these that exists is the checkpoint (as in the transformers library).
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_folder(folder: Path, readers: dict[Path, Reader]) -> tuple[Path, dict[str, TensorRef]]:
    """The main file of a folder's weights, and the places of its tensors by stored name.

    ``readers`` gets one for each file that had to be opened for this (torch files).

    Raises:
        CheckpointError: no weights, or files that are damaged, missing or do not fit their index.
    """
    source = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if source is None:
        why, fix = explain_folder(folder) or ("", "Give the folder that holds the weights as --model.")
        looked = f"Looked for {', '.join(WEIGHT_FILES)}."
        raise CheckpointError(f"No weights in {folder}.", f"{why} {looked}".strip(), fix)
    return source, _read_shards(source, readers) if source.suffix == ".json" else read_file(source, readers)


def read_file(path: Path, readers: dict[Path, Reader]) -> dict[str, TensorRef]:
    """:func:`read_folder` of one file."""
    if path.suffix == ".safetensors":
        refs = read_header(path)
    else:
        tensors = read_torch(path)
        readers[path] = tensors.__getitem__
        refs = torch_refs(path, tensors)
    check_unquantised({name: ref.dtype for name, ref in refs.items()}, str(path))
    if advice := explain_wrapper(refs):
        raise CheckpointError(f"{path} holds no plain weights.", *advice)
    return refs


def _read_shards(index: Path, readers: dict[Path, Reader]) -> dict[str, TensorRef]:
    weight_map = read_index(index)
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        lost = [k for k, v in weight_map.items() if v in absent]
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of the {len(shards)} shards its index names.",
            f"Missing {', '.join(absent)}, with {named(lost)}",
            "Download the missing files.",
        )
    located: dict[str, TensorRef] = {}
    for shard in shards:
        refs = read_file(index.parent / shard, readers)
        twice = [k for k in refs if k in located]
        if twice:
            raise CheckpointError(f"{index.parent} holds tensors in two shards.", named(twice))
        located.update(refs)
    moved = [k for k, v in weight_map.items() if k not in located or located[k].file.name != v]
    unlisted = [k for k in located if k not in weight_map and not is_ignored(k)]
    for names, what in ((moved, "are not in the shard the index names"), (unlisted, "are not in the index")):
        if names:
            raise CheckpointError(
                f"{index} does not fit its shards.",
                f"Tensors that {what}: {named(names)}",
                "Download it again.",
            )
    return located
