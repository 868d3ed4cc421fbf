"""The plan of a bulk embedding: which inputs, in which order, in which shards, by which bundle and settings.

It is made from the sources alone, in one order, and written before anything is embedded:

``inputs.parquet``
    the files of all sources: name, size, time of the last change, number of items.
``plan.json``
    bundle, settings, versions, and the hash of that list. A plan without this file is no plan.

Shard ``i`` is the items ``i * shard_items`` to ``(i + 1) * shard_items`` of all files in order: what is in it
follows from the plan, and who computes it, and when, changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import BuildError, InputError, IntegrityError, UsageError
from ..files.hashing import sha256_json
from ..files.json import Count, Sha256, decode
from ..files.write import atomic_binary
from ..inputs.tables import load_pyarrow
from ..progress import SILENT, Progress
from ..runtime import ivf
from ..runtime.shards import Embedding, shard_name
from .sources import (
    KINDS,
    Choice,
    InputFile,
    Item,
    Reader,
    key_hashes,
    labels_of,
    open_file,
    refuse_duplicates,
    refuse_sources,
    source_files,
)

SCHEMA = "ivl-export.embed-plan/1"
PLAN, INPUTS, QUARANTINE = "plan.json", "inputs.parquet", "quarantine.jsonl"
SHARD_ITEMS = 16384
MAX_ITEMS = 1 << 36


@dataclass(frozen=True)
class Work:
    """How a plan is cut and computed, apart from what its vectors are.

    Args:
        choice: which items are taken.
        shard_items: inputs of a shard.
        batch: rows computed at once.
        image_rows: the most rows of an image, its tiles.
        threads: of an engine on the CPU; 0: all cores.
        device: of the engines; empty: the backend's usual one.
    """

    choice: Choice
    shard_items: Count = SHARD_ITEMS
    batch: Count = 8
    image_rows: Count = 1
    threads: Count = 0
    device: str = ""


@dataclass(frozen=True)
class Plan:
    """Inputs and settings.

    Args:
        embedding: what the vectors are.
        work: how inputs are cut and computed.
        sources: their paths, as they were named.
        files: of all sources, in order.
        versions: of the programs whose releases may change bits.
    """

    embedding: Embedding
    work: Work
    sources: tuple[str, ...]
    files: tuple[InputFile, ...]
    versions: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _ends(self) -> list[int]:
        """Items up to the end of each file."""
        return list(accumulate((file.items for file in self.files), initial=0))

    @property
    def items(self) -> int:
        """All inputs."""
        return self._ends[-1]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.items // self.work.shard_items)

    def numbers(self, shard: int) -> range:
        """The items of a shard."""
        start = shard * self.work.shard_items
        return range(start, min(start + self.work.shard_items, self.items))

    @cached_property
    def files_digest(self) -> str:
        """sha256 of source, name, size and items of all files; not of their times."""
        digest = sha256()
        for file in self.files:
            name = os.fsencode(file.name)
            digest.update(b"%d %d %d %d " % (file.source, file.size, file.items, len(name)) + name)
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """sha256 of all that shards depend on, but for the contents of files."""
        work, embedding = asdict(self.work), asdict(self.embedding)
        return sha256_json([SCHEMA, embedding, work, self.versions, self._labels, self.files_digest])

    @cached_property
    def _labels(self) -> list[str]:
        return labels_of([Path(source) for source in self.sources])

    def path(self, file: InputFile) -> Path:
        """Where a file of the plan is."""
        source = Path(self.sources[file.source])
        if source.is_dir():
            return source / file.name
        return source.parent / file.name  # a file itself, or one of several named with braces

    def reader(self, file: InputFile) -> Reader:
        """The items of a file; errors as :func:`.sources.open_file`."""
        return open_file(self.path(file), self._labels[file.source] + file.name, self.work.choice)

    def items_of(self, numbers: range) -> Iterator[Item]:
        """The items of these numbers, in order.

        Raises:
            InputError: a file changed, is gone, or cannot be read.
        """
        start = numbers.start
        index = bisect_right(self._ends, start) - 1
        while start < numbers.stop:
            file, first = self.files[index], self._ends[index]
            stop = min(numbers.stop, first + file.items)
            if start < stop:
                reader = self.reader(file)
                if len(reader) != file.items:
                    raise _changed(f"{file.name} has {len(reader)} items, the plan says {file.items}.")
                yield from reader.items(start - first, stop - first)
            start, index = max(start, stop), index + 1


def make_plan(
    embedding: Embedding,
    work: Work,
    sources: Sequence[Path],
    out: Path,
    versions: dict[str, str],
    earlier: Plan | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """List the inputs of ``sources``.

    Args:
        embedding, work, versions: of the plan.
        sources: folders and files.
        out: the folder that the shards go to.
        earlier: a plan of the same sources, whose counts are taken where a file did not change.
        progress: receives the files that are counted.

    Raises:
        UsageError: no sources, or ``out`` in one of them.
        InputError: a source that cannot be read, is empty, or gives a key twice.
        CapabilityError: pyarrow is not installed.
    """
    refuse_sources(sources, out)
    choice = work.choice
    if unknown := [kind for kind in choice.kinds if kind not in KINDS]:
        raise UsageError(
            f"There is no kind {unknown[0]!r}.", f"Known: {', '.join(KINDS)}.", "Name some of these."
        )
    listed = [pair for number, source in enumerate(sources) for pair in source_files(source, number, choice)]
    known = {(f.source, f.name): f for f in earlier.files} if earlier and _same_items(earlier, work) else {}
    labels = labels_of(sources)
    files, hashes, changed = [], [], False
    progress.started("plan", len(listed), "files")
    for number, (file, path) in enumerate(listed, 1):
        before = known.get((file.source, file.name))
        if before is not None and file.unchanged(before):
            files.append(replace(file, items=before.items))
            continue
        changed = True
        reader = open_file(path, labels[file.source] + file.name, choice)
        files.append(replace(file, items=len(reader)))
        if number % 256 == 0:
            progress.advanced(number)
    paths = tuple(os.fspath(source.absolute()) for source in sources)
    plan = Plan(embedding, work, paths, tuple(files), versions)
    if not plan.items:
        raise InputError(
            f"Nothing to embed in {', '.join(str(source) for source in sources)}.",
            f"Its {len(files)} files have no {' or '.join(choice.kinds)}.",
            "Name another source, or say what is embedded: --kinds image,video,text.",
        )
    if plan.items > MAX_ITEMS:
        raise InputError(f"{plan.items:,} inputs are over {MAX_ITEMS:,}.", "", "Embed them in several runs.")
    if changed:
        hashes = [key_hashes(plan.reader(file)) for file in plan.files]
        refuse_duplicates(hashes, [(f.name, lambda f=f: plan.reader(f)) for f in plan.files])
    return plan


def _same_items(earlier: Plan, work: Work) -> bool:
    return earlier.work.choice == work.choice


# --- on disk ---


@dataclass(frozen=True)
class _PlanFile:
    """The content of ``plan.json``."""

    schema: str
    plan: Sha256
    embedding: Embedding
    work: Work
    sources: tuple[str, ...]
    inputs: Sha256
    items: Count
    shards: Count
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"has the schema {self.schema!r}, not {SCHEMA!r}")


def save_plan(plan: Plan, out: Path) -> None:
    """Write the plan to ``out``: first the list of inputs, then ``plan.json``, each whole or not at all."""
    pa = load_pyarrow("Plans of embeddings", "embed")
    names = [os.fsencode(file.name) for file in plan.files]
    columns = {"source": pa.int32(), "size": pa.int64(), "mtime_ns": pa.int64(), "items": pa.int64()}
    arrays = {key: pa.array([getattr(f, key) for f in plan.files], kind) for key, kind in columns.items()}
    table = pa.table({"name": pa.array(names, pa.binary()), **arrays})
    sources = tuple(map(printable, plan.sources))
    data = _PlanFile(
        SCHEMA,
        plan.digest,
        plan.embedding,
        plan.work,
        sources,
        plan.files_digest,
        plan.items,
        plan.shards,
        plan.versions,
    )
    place = out / INPUTS
    with writing(place), atomic_binary(place, durable=True, exclusive=True) as file:
        pa.parquet.write_table(table, pa.PythonFile(file, "w"), compression="zstd")
    write_whole(out / PLAN, (json.dumps(asdict(data), indent=1, sort_keys=True) + "\n").encode())


def load_plan(out: Path) -> Plan | None:
    """The plan in ``out``; None if there is none.

    Raises:
        IntegrityError: a plan that is damaged.
    """
    if not (out / PLAN).is_file():
        return None
    pa = load_pyarrow("Plans of embeddings", "embed")
    data = decode(_PlanFile, out / PLAN, what=f"The plan in {out}", fix=_AFRESH)
    try:
        rows = pa.parquet.read_table(out / INPUTS).to_pylist()
        names = [field.name for field in fields(InputFile)]
        files = tuple(
            InputFile(**{**{n: row[n] for n in names}, "name": os.fsdecode(row["name"])}) for row in rows
        )
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise IntegrityError(f"{out / INPUTS} cannot be read.", f"{error}.", _AFRESH) from error
    plan = Plan(data.embedding, data.work, data.sources, files, data.versions)
    if (plan.digest, plan.files_digest) != (data.plan, data.inputs):
        raise IntegrityError(f"The plan in {out} is damaged.", "Its hashes do not fit.", _AFRESH)
    return plan


_AFRESH = "Run the command with --force, which starts again from nothing."


def check_same(plan: Plan, earlier: Plan, out: Path) -> list[InputFile]:
    """The files of ``plan`` that may have changed since ``earlier`` was made: their times are others.

    Raises:
        UsageError: the plans differ in bundle, settings, programs or inputs; the difference is named.
    """
    if plan.digest == earlier.digest:
        pairs = zip(plan.files, earlier.files, strict=True)
        return [file for file, before in pairs if not file.unchanged(before)]
    fix = "Give what it was begun with, choose another --out, or start again from nothing with --force."
    if plan.embedding.bundle != earlier.embedding.bundle:
        one, other = earlier.embedding, plan.embedding
        why = f"It was begun with {one.name} ({one.bundle[:12]}), this is {other.name} ({other.bundle[:12]})."
        raise UsageError(f"{out} has embeddings of another bundle.", why, fix)
    old, new = ({**asdict(p.embedding), **_flat(asdict(p.work)), **p.versions} for p in (earlier, plan))
    settings = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if settings:
        raise UsageError(f"{out} was begun with other settings.", f"{'; '.join(settings)}.", fix)
    before, now = ({(f.source, f.name): (f.size, f.items) for f in p.files} for p in (earlier, plan))
    gone, more = [k for k in before if k not in now], [k for k in now if k not in before]
    other_size = [k for k in now if k in before and now[k] != before[k]]
    parts = [
        f"{len(keys)} {word} ({_text(keys[0][1])})"
        for keys, word in ((gone, "missing"), (more, "new"), (other_size, "of another size"))
        if keys
    ]
    why = f"Files since the run was begun: {', '.join(parts)}." if parts else "There are other sources."
    raise UsageError(f"The inputs of {out} have changed.", why, fix)


def _flat(work: dict[str, Any]) -> dict[str, Any]:
    return {**work.pop("choice"), **work}


def _text(name: str) -> str:
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """``text`` without control characters and lone surrogates, which become escapes."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _changed(why: str) -> InputError:
    return InputError(
        "An input changed while it was embedded.", why, "Run the command again; --force starts from nothing."
    )


# --- the folder ---


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The block writes ``path``; a file system that refuses becomes a BuildError."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"Cannot write {path}.",
            f"{error.strerror or error}.",
            "Make room, or make it writable; the same command goes on from here.",
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write ``path``, whole or not at all; BuildError if it cannot be."""
    with writing(path), atomic_binary(path, durable=True, exclusive=True) as file:
        file.write(data)


def clear(out: Path) -> None:
    """Delete a plan and all that was made from it."""
    for name in (PLAN, QUARANTINE, INPUTS):  # the plan first: without it the rest counts for nothing
        (out / name).unlink(missing_ok=True)
    for path in own_files(out):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / ivf.FOLDER, ignore_errors=True)


def own_files(out: Path) -> list[Path]:
    """Files in ``out`` that a run makes, finished ones and remains of killed ones."""
    names = [PLAN, INPUTS, QUARANTINE]
    hidden = [path for name in names for path in (out / name, out / f".{name}.tmp") if path.is_file()]
    return [*hidden, *out.glob("shard-*.parquet"), *out.glob(".shard-*.parquet.tmp")]


def prepare_folder(out: Path) -> None:
    """Make ``out``; UsageError if it holds anything but a run's own files."""
    if not out.exists():
        with writing(out):
            out.mkdir(parents=True)
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder.", "", "Give --out another name.")
    own = set(own_files(out))
    foreign = sorted(path.name for path in out.iterdir() if path not in own and path.name != ivf.FOLDER)
    if foreign and not (out / PLAN).is_file():
        raise UsageError(
            f"{out} has other files in it.", f"{foreign[0]} is not of an embedding.", "Give a new folder."
        )


def path_of(out: Path, shard: int) -> Path:
    """The file of a shard in ``out``."""
    return out / shard_name(shard)
