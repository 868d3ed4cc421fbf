"""Writes a package: everything goes to a staging folder next to its place, which is renamed when it is done.

A package has ``package.json``, by which ``--force`` knows that a folder is one and may be replaced.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..bundle import Bundle
from ..bundle.manifest import MANIFEST
from ..bundle.replace import swap
from ..errors import BuildError, UsageError
from ..files.hashing import sha256_file
from ..files.locks import locked
from ..files.write import flush
from ..progress import SILENT, Progress, reported
from ..settings import read_settings
from .contract import File, Format, Job, Pieces
from .registry import find_format

MARKER = "package.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Package:
    """A package, made or (of a dry run) planned.

    Args:
        root: its folder.
        format: name of its format.
        files: path in the package -> bytes; None: known only when it is made.
        pending: what else is put into it.
        made: False of a dry run.
    """

    root: Path
    format: str
    files: dict[str, int | None]
    pending: tuple[str, ...] = ()
    made: bool = True

    @property
    def size(self) -> int:
        """Bytes of all files, as far as they are known."""
        return sum(size or 0 for size in self.files.values())


def write_package(
    bundle: Path | str | Bundle,
    format: str,
    out: Path | None = None,
    name: str | None = None,
    settings: Mapping[str, object] | Iterable[str] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Package:
    """See :func:`ivl_export.package`."""
    kind = find_format(format)
    options = read_settings(kind.settings, settings, f"setting of --format {kind.name}")
    root = bundle.root if isinstance(bundle, Bundle) else Path(bundle)
    chosen = root.resolve().name if name is None else name
    if not _NAME.fullmatch(chosen):
        raise UsageError(
            f"{chosen!r} cannot be the name of a package.",
            "It becomes part of file names and addresses: letters, digits, dot, hyphen and underscore, at "
            "most 63.",
            "Give another --name.",
        )
    place = out or Path("packages") / f"{chosen}-{kind.name}"
    _check_place(place, root, force)
    with reported(progress, "verify the bundle"):
        opened = Bundle.open(root, "hash")
    job = Job(opened, chosen, options)
    files = [*kind.files(job), *job.bundle_files(), File(MARKER, _marker(job, kind))]
    sizes = {file.path: file.size for file in sorted(files, key=lambda file: file.path)}
    if dry_run:
        return Package(place, kind.name, sizes, kind.pending(job), made=False)
    with _disk_errors(place), _staging(place) as staging:
        _check_room(place, sum(size or 0 for size in sizes.values()))
        _copy(files, staging, progress)
        if kind.complete is not None:
            kind.complete(job, staging, progress)
        with reported(progress, "flush to the disk"):
            paths = sorted(staging.rglob("*"))
            for path in (*paths, staging):
                flush(path)
        written = {p.relative_to(staging).as_posix(): p.stat().st_size for p in paths if p.is_file()}
        swap(staging, place, MARKER, "a package")
    return Package(place, kind.name, dict(written))


def _check_place(out: Path, bundle: Path, force: bool) -> None:
    """UsageError where a package cannot be, or is and may not be replaced."""
    here, root = out.resolve(), bundle.resolve()
    if here == root or root in here.parents or here in root.parents:
        raise UsageError(
            f"{out} cannot be the package of {bundle}.",
            "One of the two folders would be inside the other.",
            "Give --out a folder elsewhere.",
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARKER).is_file():
        raise UsageError(
            f"{out} exists and is not a package.", "It is never replaced.", "Give another --out."
        )
    if not force:
        raise UsageError(f"{out} exists.", "It is a package already.", "Give --force to replace it.")


def _marker(job: Job, kind: Format) -> str:
    manifest = job.bundle.manifest
    data = {
        "package": kind.name,
        "name": job.name,
        "ivl_export": __version__,
        "model": manifest.model.name,
        "recipe": manifest.recipe,
        "bundle": f"sha256:{sha256_file(job.bundle.root / MANIFEST)}",
        "settings": {key: value for key, value in job.settings.items() if value is not None},
    }
    return json.dumps(data, indent=2, default=str) + "\n"


def _copy(files: list[File], staging: Path, progress: Progress) -> None:
    with reported(progress, "write files", len(files)) as advanced:
        for done, file in enumerate(files, 1):
            target = staging / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.content, str):
                target.write_text(file.content, encoding="utf-8", newline="\n")
            elif isinstance(file.content, bytes):
                target.write_bytes(file.content)
            elif isinstance(file.content, Pieces):
                file.content.write(target)
            elif isinstance(file.content, Path):
                shutil.copyfile(file.content, target)  # no hard link: onnx refuses weights with a second name
            else:
                file.content(target)
            target.chmod(0o755 if file.executable else 0o644)
            advanced(done, detail=file.path)


def _check_room(out: Path, size: int) -> None:
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    if size > free:
        raise BuildError(
            f"The disk is too small for the package {out}.",
            f"It takes {size:,} bytes, {free:,} are free in {parent}.",
            "Free some space, or give --out a folder on another disk.",
        )


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A new folder next to ``out``; removed when the block ends, if it is still there."""
    staging = out.absolute().with_name(f".{out.name}.package")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with locked(staging, wait=False):
            for old in staging.iterdir():  # of a process that was killed
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except BlockingIOError as error:
        raise BuildError(
            f"Another process is making the package {out}.", f"It writes to {staging}.", "Wait for it to end."
        ) from error


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise BuildError(
            f"The package {out} could not be written.",
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.",
            "Free some space, or give --out a folder on another disk." if full else "Give another --out.",
        ) from error
