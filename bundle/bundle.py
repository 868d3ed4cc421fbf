"""The artifact: a folder of graphs, weights, engines and receipts under one hashed ``manifest.json``.

:class:`Bundle` opens one, :func:`seal` writes one. A bundle loads offline and is checked when it is opened;
files are reached only through the manifest.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..errors import BuildError, CapabilityError, IntegrityError
from ..files.hashing import sha256_file
from ..files.json import read_json
from ..files.lfs import refuse_lfs_pointer
from ..files.write import flush
from .manifest import MANIFEST, EngineFile, FileEntry, Manifest, manifest_from_json, read_manifest
from .replace import restore, swap
from .spec import ComponentSpec

Verify = Literal["size", "hash"]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, verify: Verify | None = "size") -> Bundle:
        """Open and check the bundle in ``path``.

        Args:
            path: the bundle's folder.
            verify: ``"size"`` checks that every listed file is there and of its size (milliseconds);
                ``"hash"`` reads every byte as well and refuses unlisted files; None: the manifest alone.

        Raises:
            IntegrityError: not a bundle, an invalid manifest, or a file that is not as listed.
        """
        root = Path(path)
        if not root.exists():
            restore(root)
        bundle = cls(root, read_manifest(root / MANIFEST))
        if verify is not None:
            bundle.check(verify)
        return bundle

    def check(self, verify: Verify = "hash") -> None:
        """Compare every listed file with its size (``"hash"``: and content); IntegrityError if unlike."""
        for rel, entry in self.manifest.files.items():
            file = self.path(rel)
            size = file.stat().st_size
            if size != entry.size:
                refuse_lfs_pointer(file, IntegrityError)
                _refuse(self.root, rel, f"has {size} bytes, the manifest says {entry.size}")
            if verify == "hash" and (digest := sha256_file(file)) != entry.sha256:
                _refuse(self.root, rel, f"has sha256 {digest[:16]}…, the manifest says {entry.sha256[:16]}…")
        if verify == "hash":
            for file in _walk(self.root):
                rel = file.relative_to(self.root).as_posix()
                if rel != MANIFEST and rel not in self.manifest.files:
                    _refuse(self.root, rel, "is not listed in the manifest")

    def path(self, rel: str) -> Path:
        """The listed file ``rel``; IntegrityError if it is unlisted, missing or a link out of the bundle."""
        if rel not in self.manifest.files:
            _refuse(self.root, rel, "is not listed in the manifest")
        file = self.root / rel
        try:
            mode = file.stat().st_mode
            inside = file.resolve(strict=True).is_relative_to(self.root.resolve(strict=True))
        except OSError as error:
            _refuse(self.root, rel, f"cannot be read: {error.strerror or error}")
        if not inside:
            raise IntegrityError(
                f"{file} is a link to a place outside the bundle.",
                f"It is {file.resolve()}; runtimes refuse weights outside the folder of their graph.",
                "Copy the bundle with its links resolved: cp -rL, or 'hf download --local-dir'.",
            )
        if not stat.S_ISREG(mode):
            _refuse(self.root, rel, "is not a regular file")
        return file

    def spec(self, component: str) -> ComponentSpec:
        """The contract of ``component``; CapabilityError if the bundle has no such component."""
        if component not in self.manifest.components:
            raise CapabilityError(
                f"This bundle has no component {component!r}.",
                f"It has {', '.join(self.manifest.components) or 'none'}.",
                f"Rebuild it with --components including {component}.",
            )
        return self.manifest.components[component].spec

    def graph(self, component: str, dtype: str) -> Path:
        """The ONNX graph of ``component`` that computes in ``dtype`` (``fp32``, ``bf16``, ``fp16``)."""
        self.spec(component)
        graphs = self.manifest.components[component].graphs
        if dtype not in graphs:
            raise CapabilityError(
                f"This bundle has no {dtype} graph of {component}.",
                f"It has {', '.join(graphs) or 'none'}.",
                "Build the bundle again with a recipe of that base.",
            )
        return self.path(graphs[dtype])

    def engines(self, component: str, backend: str, target: str | None = None) -> tuple[EngineFile, ...]:
        """The engine of ``component`` for ``backend`` (and ``target``: the first one if None).

        One file, or one for each part of a split component, in the order they run. ONNX Runtime reads the
        graph itself: where no engine is listed for it, the fp32 graph is its engine. CapabilityError names
        the existing ones.
        """
        self.spec(component)
        engines = [e for e in self.manifest.engines if e.component == component]
        for engine in engines:
            if engine.backend == backend and target in (None, engine.target):
                parts = [e for e in engines if (e.backend, e.target) == (backend, engine.target)]
                return tuple(sorted(parts, key=lambda e: e.part))
        graph = self.manifest.components[component].graphs.get("fp32")
        if backend == "onnxruntime" and target in (None, "cpu") and graph is not None:
            return (EngineFile(component, backend, "cpu", graph, ""),)
        have = ", ".join(sorted({f"{e.backend}-{e.target}" for e in engines}))
        fix = f"Rebuild it with --backend {backend}{f' --targets {target}' if target else ''}."
        raise CapabilityError(
            f"This bundle has no engine of {component} for {backend}{f'-{target}' if target else ''}.",
            f"It was built for {have or 'ONNX Runtime on the CPU only'}.",
            "Leave the target out: ONNX Runtime's is cpu." if backend == "onnxruntime" else fix,
        )

    def receipt(self, name: str) -> Any:
        """The content of ``receipts/<name>.json``."""
        return read_json(self.path(f"receipts/{name}.json"))


def seal(staging: Path, manifest: Manifest, out: Path) -> Bundle:
    """Turn the finished folder ``staging`` into the bundle ``out``, replacing a bundle that is there.

    Hashes every file, writes ``manifest.json`` (``manifest.files`` is filled here), flushes all to disk and
    swaps the folders (see :mod:`.replace`). ``staging`` must be on the same file system as ``out``.

    Raises:
        BuildError: the disk is full, ``staging`` holds links, ``out`` is something else than a bundle, or the
            manifest refers to files that are not there.
    """
    with disk_errors(out):
        files = {}
        for file in _walk(staging):
            rel = file.relative_to(staging).as_posix()
            if rel == MANIFEST:
                continue  # of a seal that was interrupted; written again below
            if file.is_symlink() or not file.is_file():
                raise BuildError(f"{rel} cannot go into a bundle.", "It is not a regular file.", "Copy it.")
            flush(file)
            files[rel] = FileEntry(sha256_file(file), file.stat().st_size)
        sealed = manifest.with_files(files)
        try:
            text = sealed.dumps()
            manifest_from_json(json.loads(text))
        except (IntegrityError, TypeError, ValueError) as error:
            raise BuildError("The bundle's manifest cannot be written.", str(error)) from error
        (staging / MANIFEST).write_text(text, encoding="utf-8")
        flush(staging / MANIFEST)
        for folder in sorted({file.parent for file in _walk(staging)} | {staging}):
            flush(folder)
        swap(staging, out)
    return Bundle(out, sealed)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn an OSError that comes up while the bundle ``out`` is made into a BuildError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "Check that place, or give --out another folder; 'build' again continues from here."
        if full:
            fix = "Free some space or give --out a folder on another disk; 'build' again continues from here."
        elif error.errno == errno.EXDEV:
            fix = "The staging folder must be on the same file system as --out."
        what = "The disk is full" if full else "The file system refused"
        raise BuildError(f"{what} while making the bundle {out}.", str(error), fix) from error


def _walk(root: Path) -> Iterator[Path]:
    """Every path below ``root`` that is not a folder (links to folders count as files), in a fixed order."""
    for folder, names, files in os.walk(root):
        names.sort()
        links = [n for n in names if (Path(folder) / n).is_symlink()]
        yield from (Path(folder) / n for n in sorted(files + links))


def _refuse(root: Path, rel: str, why: str) -> NoReturn:
    raise IntegrityError(
        f"The bundle {root} is damaged: {rel}.",
        f"It {why}.",
        "Copy the bundle again from where it was built, or rebuild it.",
    )
