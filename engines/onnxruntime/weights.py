"""One copy of the weights for ONNX Runtime's sessions on the CPU: files that all of them map.

A session folds the stored weights for its kernels and packs them, in its own memory. Here its optimised
graph is saved once, packed weights included, and each weight becomes a file named by its content:
where a graph has an equal one, sessions map the same pages, in this process and in others.

ONNX Runtime packs each weight again when it opens such a graph, and takes the pages only if they are equal:
weights for a processor with other kernels are in the session's own memory. The files are in ``weights/`` of
the cache folder (:mod:`...files.cache_dir`), by the bundle's graphs and weights, ONNX Runtime's release and
the processor.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...bundle import Bundle
from ...errors import CapabilityError, IvlError
from ...files.cache_dir import cache_folder, cache_limit, prune, remove, touch
from ...files.hashing import sha256_file, sha256_file_once, sha256_json, sha256_sources
from ...files.locks import locked
from ...files.seals import damaged, write_seal
from ...files.write import atomic, flush
from ..onnx_graph import Graph, read_graph
from ..protobuf import delimited, fields, messages, rewritten

KIND = "weights"
LEAST_SAVED = 64 << 20
"""Bytes of fp32 that sharing must save to be done unasked."""
LEAST_STORED = 16 << 20
"""Bytes of stored weights below which a bundle's graphs are not looked at."""
LEAST_TENSOR = 64 << 10
"""Bytes of the smallest weight, in fp32, that is a file."""
_HEADROOM = 1 << 30
_CODE = ("session.py", "weights.py")
"""Session settings that decide how graphs are optimised and stored."""
_PAGE = 4096
_GRAPH, _INITIALIZER, _EXTERNAL = 7, 5, 13
"""Fields of ModelProto, GraphProto and TensorProto."""

Save = Callable[[Path, dict[str, str]], None]


@dataclass(frozen=True)
class SharedWeights:
    """Folder of the weights that components share; ``required``: it is an error if they cannot."""

    folder: Path
    required: bool = False

    def graph(self, path: Path, save: Save) -> Path | None:
        """The graph that runs instead of the graph ``path``; made by ``save`` (file, settings) if need be.

        None if it cannot be kept; CapabilityError then if sharing is ``required``.
        """
        shared = self.folder / path.name
        seal = shared.with_suffix(".seal")
        try:
            if damaged(seal) != frozenset():
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder.with_suffix(".lock")):
                    wrong = damaged(seal)
                    if wrong != frozenset():
                        for name in (*(wrong or ()), shared.name, seal.name):
                            _clear(self.folder / name)
                        write_seal(seal, _make(shared, save))
                own = sum(file.stat().st_size for file in self.folder.iterdir())
                prune(limit=max(own, cache_limit()), kinds=(KIND,))
        except (OSError, LookupError, ValueError, IvlError) as error:  # or ONNX Runtime writes other files
            if self.required:
                raise CapabilityError(
                    "Weights cannot be shared.",
                    str(error),
                    "Set IVL_EXPORT_CACHE to a folder with more room, or give share_weights=False.",
                ) from error
            return None
        touch(self.folder)
        return shared

    def forget(self) -> None:
        """Delete the files: they cannot be used."""
        remove(self.folder)


def shared_weights(bundle: Bundle, share: bool | None) -> SharedWeights | None:
    """How the components of ``bundle`` share weights; None: not at all.

    ``share`` None: where that saves :data:`LEAST_SAVED` and the files fit the cache's limit and the disk.
    """
    stored = {rel: entry for rel, entry in bundle.manifest.files.items() if rel.startswith("onnx/")}
    if share is False or (share is None and sum(e.size for e in stored.values()) < LEAST_STORED):
        return None
    sizes: dict[str, int] = {}
    owners: dict[str, list[str]] = {}
    for name, component in bundle.manifest.components.items():
        if "fp32" in component.graphs:
            for key, size in _large(read_graph(bundle.path(component.graphs["fp32"]))):
                sizes[key] = size
                owners.setdefault(key, []).append(name)
    saved = sum(sizes[key] * (len(names) - 1) for key, names in owners.items())
    needed = 2 * sum(sizes.values())  # folded, and packed
    if share is None and (saved < LEAST_SAVED or needed > min(cache_limit(), _free())):
        return None
    code = sha256_sources(Path(__file__).parent, _CODE)
    content = [code, sorted((rel, entry.sha256) for rel, entry in stored.items()), _release(), _processor()]
    return SharedWeights(cache_folder() / KIND / sha256_json(content), bool(share))


def _large(graph: Graph) -> Iterator[tuple[str, int]]:
    """Names of large weights, and their bytes in fp32."""
    for name, (kind, shape) in graph.initializers.items():
        size = 4 * math.prod(shape)
        if size >= LEAST_TENSOR:
            yield f"{name} {kind} {shape}", size


def _make(target: Path, save: Save) -> dict[str, str]:
    """Write graph ``made``, and the files of weights that are not there yet; the hashes of all of them."""
    digests: dict[str, str] = {}
    with _scratch(target.parent) as folder:
        model, weights = folder / target.name, folder / "weights"
        save(
            model,
            {
                "session.optimized_model_external_initializers_file_name": weights.name,
                "session.optimized_model_external_initializers_min_size_in_bytes": str(LEAST_TENSOR),
                "session.save_external_prepacked_constant_initializers": "1",
            },
        )
        if weights.is_file() and weights.stat().st_size:
            with weights.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

            def change(tensor: memoryview) -> bytes:
                return _relocated(tensor, data, target.parent, digests)

            graph = memoryview(model.read_bytes())
            model.write_bytes(rewritten(graph, (_GRAPH, _INITIALIZER), change))
        flush(model)
        digests[target.name] = sha256_file(model)
        model.replace(target)
    return digests


def _clear(path: Path) -> None:
    """Remove the file or folder at ``path``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    folder = parent / ".making"  # under the lock: files of a killed process are unused
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _relocated(tensor: memoryview, data: memoryview, folder: Path, digests: dict[str, str]) -> bytes:
    """A TensorProto whose bytes, folded and packed, are a file in ``folder`` instead of parts of ``data``.

    The file's name and hash are added to ``digests``. Its ``external_data`` has entries ``location``,
    ``offset``, ``length``, and ``prepacked_0`` and so on:
    ``key|offset;length;checksum|...``.
    """
    entries = dict(map(_entry, (part for _, part in messages(tensor, _EXTERNAL))))
    if not entries:
        return bytes(tensor)
    parts: list[memoryview] = []
    at = 0

    def moved(offset: str, length: str) -> str:
        nonlocal at
        begin, size = int(offset), int(length)
        parts.extend((memoryview(bytes(-at % _PAGE)), data[begin : begin + size]))
        at += -at % _PAGE + size
        return str(at - size)

    entries["offset"] = moved(entries.get("offset", "0"), entries["length"])
    for name, value in entries.items():
        if name.startswith("prepacked"):
            key, *blobs = value.split("|")
            placed = (blob.split(";") for blob in blobs)
            entries[name] = "|".join([key, *(";".join([moved(*p[:2]), *p[1:]]) for p in placed)])
    entries["location"], digest = _kept(parts, folder)
    digests[entries["location"]] = digest

    def again(entry: memoryview) -> bytes:
        name, _ = _entry(entry)
        return delimited(1, name.encode()) + delimited(2, entries[name].encode())

    return rewritten(tensor, (_EXTERNAL,), again)


def _entry(data: memoryview) -> tuple[str, str]:
    """A StringStringEntryProto."""
    values = {number: str(value, "utf-8") for number, value in fields(data) if isinstance(value, memoryview)}
    return values.get(1, ""), values.get(2, "")


def _kept(parts: list[memoryview], folder: Path) -> tuple[str, str]:
    """Name and hash of the file of ``parts``, named by content; written unless it is there, undamaged."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    digest = hasher.hexdigest()
    file = folder / f"{digest[:32]}.bin"
    if not file.is_file() or sha256_file_once(file) != digest:
        with atomic(file, durable=True, exclusive=True) as partial, partial.open("wb") as out:
            out.writelines(parts)
    return file.name, digest


def _free() -> int:
    """Bytes that may be written where the cache is."""
    folder = cache_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free - _HEADROOM
    except OSError:
        return 0


def _release() -> str:
    try:
        import onnxruntime
    except (ImportError, OSError):
        return ""  # opening a session says so
    return str(onnxruntime.__version__)


def _processor() -> str:
    """Processor features that decide ONNX Runtime's kernels, and so its packing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields_used = ("model name", "flags", "Features", "CPU part")
    known = sorted({line for line in lines if line.startswith(fields_used)})
    return "\n".join([platform.machine(), platform.processor(), *known])
