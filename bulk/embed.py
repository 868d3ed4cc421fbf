"""Embeds a plan: readers in threads decode ahead while the engine runs, a shard at a time is written.

Inputs are read in groups that are cut within their shard, and each group is computed by itself. So the bytes
of a shard follow from the plan and the inputs: :func:`embed_shard` gives the same wherever and whenever it
runs, and a run that was killed only has to make the shards that are missing.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..arrays import Array, Floats
from ..engines.device import to_host
from ..errors import InputError, IntegrityError, UsageError
from ..files.locks import locked
from ..files.write import flush
from ..host import cores
from ..inputs.preprocess import PixelValues
from ..inputs.video import frames_of
from ..progress import SILENT, Progress
from ..runtime.chat import InternVLChat
from ..runtime.components import visual_embeds
from ..runtime.image_batches import Reading, read_batch
from ..runtime.invariance import encode_texts, in_batches
from ..runtime.model import InternVL
from ..runtime.shards import Quarantined, ShardReceipt, read_receipt, write_shard
from ..runtime.zero_shot import l2
from .plan import (
    QUARANTINE,
    Plan,
    check_same,
    clear,
    load_plan,
    path_of,
    prepare_folder,
    printable,
    save_plan,
    write_whole,
    writing,
)
from .sources import InputFile, Item

Model = InternVL | InternVLChat
TEXTS = 256
"""Texts that are computed together: more of them have one padded length."""
REASON = 400
"""Letters of a reason in quarantine."""
_LASTING = (ENOENT, EACCES, EPERM, ENOTDIR, EISDIR, ELOOP, ENAMETOOLONG, None)
"""Errors of files that are there, or not, in every run."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Content:
    """The embeddings of some items.

    Args:
        rows: of each item that could be embedded: its number, vectors [n, E], and the hash of its bytes.
        bad: number of each item in quarantine, and why.
        digests: sha256 of the bytes of each item; empty where they could not be read.
        items: key and kind of each.
    """

    items: list[tuple[str, str]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    rows: dict[int, Array] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)

    def add(self, other: Content) -> None:
        """Append the items of ``other``."""
        first = len(self.items)
        self.items.extend(other.items)
        self.digests.extend(other.digests)
        self.rows.update({first + i: row for i, row in other.rows.items()})
        self.bad.update({first + i: why for i, why in other.bad.items()})

    @property
    def inputs(self) -> str:
        """sha256 of keys, kinds and contents."""
        return inputs_digest(zip(self.items, self.digests, strict=True))


def inputs_digest(inputs: Iterable[tuple[tuple[str, str], bytes]]) -> str:
    """sha256 of ((key, kind), sha256 of the bytes) of items, in order."""
    digest = sha256()
    for (key, kind), content in inputs:
        name = f"{kind} {key}".encode("utf-8", "backslashreplace")
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class Group:
    """Items of a shard that are computed together, ``last`` of it or not."""

    shard: int
    items: tuple[Item, ...]
    last: bool


@dataclass(frozen=True)
class _Read:
    """A group whose files are decoded: pixels of all its images and frames, its texts, what failed."""

    group: Group
    digests: list[bytes]
    pixels: Floats
    counts: dict[int, int]
    texts: dict[int, str]
    bad: dict[int, str]


def groups(plan: Plan, shards: Iterable[int]) -> Iterator[Group]:
    """The groups of these shards, in order: of about ``batch`` images each, cut within the shard."""
    for shard in shards:
        yield from cut(shard, plan.items_of(plan.numbers(shard)), costs_of(plan), plan.work.batch)


def cut(shard: int, items: Iterable[Item], costs: dict[str, float], size: float) -> Iterator[Group]:
    """``items`` in groups that cost ``size`` each, or little more. A shard has one group at least."""
    group: list[Item] = []
    cost = 0.0
    for item in items:
        if cost + costs[item.kind] > size and group:
            yield Group(shard, tuple(group), False)
            group, cost = [], 0.0
        group.append(item)
        cost += costs[item.kind]
    yield Group(shard, tuple(group), True)


def costs_of(plan: Plan) -> dict[str, float]:
    """Rows of an engine's batch that an item of each kind takes; of texts a share."""
    embedding = plan.embedding
    return {
        "image": float(plan.work.image_rows),
        "video": float(embedding.frames),
        "text": plan.work.batch / TEXTS,
    }


def embed_shard(model: Model, plan: Plan, shard: int, threads: int | None = None) -> Content:
    """Compute one shard; ``threads`` of readers, None: as many as there are cores."""
    with closing(embed_shards(model, plan, [shard], threads)) as contents:
        return next(contents)[1]


def embed_shards(
    model: Model,
    plan: Plan,
    shards: Iterable[int],
    threads: int | None = None,
    advanced: Callable[[int, int], None] | None = None,
) -> Generator[tuple[int, Content], None, None]:
    """Compute shards one after another, the inputs of the next read meanwhile.

    Args:
        model: the plan's bundle, loaded.
        plan: what is computed.
        shards: their numbers.
        threads: readers; None: as many as there are cores.
        advanced: called with the number of items that are done, and those of them that are bad.

    Raises:
        InputError: a file of the plan changed, or can no longer be read.
    """
    yield from embed_groups(model, plan, groups(plan, shards), threads, advanced)


def embed_groups(
    model: Model,
    plan: Plan,
    parts: Iterator[Group],
    threads: int | None = None,
    advanced: Callable[[int, int], None] | None = None,
) -> Generator[tuple[int, Content], None, None]:
    """As :func:`embed_shards`, of groups: a content for each that is the ``last``."""
    count = threads or cores()
    content, done, bad = Content(), 0, 0
    with ThreadPoolExecutor(count) as pool, ThreadPoolExecutor(1) as lister:
        ready = read_ahead(pool, lambda group: _read(model, plan, group), listed(lister, parts), count + 1)
        with closing(ready):
            for read in ready:
                part = _embedded(model, plan, read)
                content.add(part)
                done, bad = done + len(part.items), bad + len(part.bad)
                if advanced is not None:
                    advanced(done, bad)
                if read.group.last:
                    yield read.group.shard, content
                    content = Content()


def listed(pool: ThreadPoolExecutor, values: Iterator[T]) -> Iterator[T]:
    """``values``, the next one made in ``pool`` while the last one is used."""
    end: Any = object()
    following = pool.submit(next, values, end)
    while (value := following.result()) is not end:
        following = pool.submit(next, values, end)
        yield value


def read_ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], values: Iterator[T], depth: int
) -> Generator[R, None, None]:
    """``function`` of each value, in order; up to ``depth`` are computed in ``pool`` before they are used."""
    waiting: deque[Future[R]] = deque()
    try:
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# --- reading ---


def _read(model: Model, plan: Plan, group: Group) -> _Read:
    """Read and decode a group. Runs in a reader's thread."""
    digests: list[bytes] = []
    texts: dict[int, str] = {}
    bad: dict[int, str] = {}
    images: dict[int, bytes] = {}
    frames: dict[int, Sequence[Any]] = {}
    for i, item in enumerate(group.items):
        digests.append(b"")
        try:
            data = item.read()
            digests[i] = sha256(data).digest()
            if item.kind == "text":
                texts[i] = _text(data, item.key)
            elif item.kind == "video":
                frames[i] = frames_of(data, plan.embedding.frames, item.key)
            else:
                images[i] = data
        except InputError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _LASTING:
                raise  # a disk or a network that fails: what is there could be read another time
            bad[i] = reason(error, plan)
    pixels: list[Floats] = []
    counts: dict[int, int] = {}
    for numbers, contents in (
        (list(images), list(images.values())),
        *(([i] * len(f), f) for i, f in frames.items()),
    ):
        if not contents:
            continue
        errors: dict[int, InputError] = {}
        names = [printable(group.items[i].key) for i in numbers]
        read = _pixels(model, plan, contents, names, errors, group.items[numbers[0]].kind == "video")
        for place, fault in errors.items():
            bad.setdefault(numbers[place], reason(fault, plan))
        keep = [place for place, i in enumerate(numbers) if i not in bad]
        pixels.append((read if len(keep) == len(numbers) else read[keep]).values)
        for place in keep:
            counts[numbers[place]] = counts.get(numbers[place], 0) + read.tiles[place]
    size = model.image_settings.size
    whole = (
        pixels[0] if len(pixels) == 1 else np.concatenate([np.zeros((0, 3, size, size), np.float32), *pixels])
    )
    return _Read(group, digests, whole, counts, texts, bad)


def _pixels(
    model: Model,
    plan: Plan,
    contents: Sequence[Any],
    names: Sequence[str],
    errors: dict[int, InputError],
    video: bool,
) -> PixelValues:
    embedding = plan.embedding

    def failed(place: int, error: InputError) -> None:
        errors[place] = error

    settings = model.image_settings.resized(embedding.resize or None)  # type: ignore[arg-type]
    reading = Reading(threads=1, approximate_jpeg=embedding.approximate_jpeg)
    tiles = None
    if settings.tiling is not None:
        tiles = 1 if video else embedding.max_tiles or None
    return read_batch(contents, settings, model.components.timings, reading, names, failed, tiles)


def _text(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The text {key} is not UTF-8.", f"{error}.") from error


def reason(error: InputError, plan: Plan) -> str:
    """Why an input is in quarantine: the same wherever the sources are, and in every run."""
    text = " ".join(part for part in (error.what, error.why) if part)
    for source in plan.sources:
        for path in {source, str(Path(source).resolve())}:
            text = text.replace(f"{path}/", "").replace(path, ".")
    return printable(re.sub(r" at 0x[0-9a-f]+", "", text))[:REASON]


# --- computing ---


def _embedded(model: Model, plan: Plan, read: _Read) -> Content:
    rows = _image_rows(model, plan, read.pixels)
    vectors: dict[int, Floats] = {}
    first = 0
    for i, count in read.counts.items():
        own, first = rows[first : first + count], first + count
        if read.group.items[i].kind == "video":
            vectors[i] = l2(own).mean(0, keepdims=True)
        else:
            vectors[i] = own if plan.embedding.tiles else own.mean(0, keepdims=True) if count > 1 else own
    if read.texts:
        assert isinstance(model, InternVL)
        texts = encode_texts(model, list(read.texts.values()), plan.work.batch)
        vectors.update({i: vector[None] for i, vector in zip(read.texts, texts, strict=True)})
    bad, good = dict(read.bad), {}
    for i in sorted(vectors):
        vector = (l2(vectors[i]) if plan.embedding.unit else vectors[i]).astype(plan.embedding.dtype)
        if np.isfinite(vector).all():
            good[i] = vector
        else:
            bad[i] = "The model's embedding of it is not finite."
    keys = [(item.key, str(item.kind)) for item in read.group.items]
    return Content(keys, read.digests, good, dict(sorted(bad.items())))


def _image_rows(model: Model, plan: Plan, pixels: Floats) -> Floats:
    """A vector [rows, E] for each row of ``pixels``: an image, a frame or a tile."""
    if isinstance(model, InternVL):
        mode = plan.embedding.mode
        parts = in_batches(lambda rows: model.encode_image(rows, mode), pixels, plan.work.batch)  # type: ignore[arg-type]
    else:
        parts = in_batches(
            lambda rows: to_host(visual_embeds(model.components, rows)).mean(1), pixels, plan.work.batch
        )
    return np.concatenate([np.zeros((0, plan.embedding.width), np.float32), *parts])


# --- writing ---


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        out: the folder.
        items, rows, quarantined: inputs, vectors, inputs that could not be embedded.
        shards, reused: all shards, and those that were there.
        seconds: of this run; ``embedded`` inputs were done in it.
    """

    out: Path
    items: int
    rows: int
    quarantined: int
    shards: int
    reused: int
    embedded: int
    seconds: float


def run(
    model: Model,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    readers: int | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Embed ``plan`` into ``out``; what an earlier run of the same plan made is kept.

    Args:
        model: the plan's bundle, loaded.
        plan: inputs and settings.
        out: the folder; made if it is missing.
        force: delete what is there first.
        readers: threads that read; None: as many as there are cores.
        progress: receives the inputs that are done.

    Raises:
        UsageError: ``out`` is of another plan, has other files, or is being written.
        InputError: no input could be embedded, or a source changed.
        BuildError: the disk is full.
    """
    start = time.perf_counter()
    prepare_folder(out)
    try:
        with locked(out, wait=False):
            receipts = begin(model, plan, out, force, progress)
            todo = [shard for shard in range(plan.shards) if shard not in receipts]
            reused = len(receipts)
            embedded = sum(len(plan.numbers(shard)) for shard in todo)
            _embed_all(model, plan, out, receipts, todo, readers, progress)
            _finish(plan, out, receipts)
    except BlockingIOError as error:
        raise UsageError(
            f"{out} is being written by another process.", "", "Wait for it, or end it."
        ) from error
    rows, bad = (
        sum(map(count, receipts.values())) for count in (lambda r: r.rows, lambda r: len(r.quarantine))
    )
    if not rows:
        first = next((q.reason for r in receipts.values() for q in r.quarantine), "")
        raise InputError(
            "No input could be embedded.",
            f"The first of {bad}: {first}",
            f"{out / QUARANTINE} lists all of them.",
        )
    seconds = time.perf_counter() - start
    return Result(out, plan.items, rows, bad, plan.shards, reused, embedded, seconds)


def begin(model: Model, plan: Plan, out: Path, force: bool, progress: Progress) -> dict[int, ShardReceipt]:
    """Write the plan, or compare it with the one in ``out``; the receipts of shards that are done."""
    if force:
        clear(out)
    earlier = load_plan(out)
    if earlier is None:
        clear(out)  # shards without a plan are those of a run that --force ended
        save_plan(plan, out)
        return {}
    touched = check_same(plan, earlier, out)
    receipts = {shard: r for shard in range(plan.shards) if (r := whole(plan, out, shard)) is not None}
    if touched:
        check_inputs(plan, out, receipts, touched, progress)
        save_plan(plan, out)
    return receipts


def whole(plan: Plan, out: Path, shard: int) -> ShardReceipt | None:
    """The receipt of a shard that is there and of ``plan``; None if it is to be made."""
    path = path_of(out, shard)
    try:
        receipt = read_receipt(path) if path.is_file() else None
    except IntegrityError:
        return None
    if receipt is None or (receipt.plan, receipt.shard) != (plan.digest, shard):
        return None
    return receipt


def check_inputs(
    plan: Plan,
    out: Path,
    receipts: dict[int, ShardReceipt],
    touched: Sequence[InputFile],
    progress: Progress,
) -> None:
    """Compare contents of finished shards that have items of ``touched`` files; UsageError if they differ."""
    places = {(file.source, file.name) for file in touched}
    ends = [0]
    for file in plan.files:
        ends.append(ends[-1] + file.items)
    shards = sorted(
        {
            number // plan.work.shard_items
            for file, first in zip(plan.files, ends, strict=False)
            if (file.source, file.name) in places and file.items
            for number in (*range(first, first + file.items, plan.work.shard_items), first + file.items - 1)
        }
        & receipts.keys()
    )
    progress.started("compare inputs", len(shards), "shards")
    for done, shard in enumerate(shards, 1):
        found = inputs_digest(_hashed(plan, shard))
        if found != receipts[shard].inputs:
            raise UsageError(
                f"The inputs of {out} have changed.",
                f"Contents of shard {shard} are others than when it was made; {touched[0].name} was touched.",
                "Restore them, choose another --out, or start again from nothing with --force.",
            )
        progress.advanced(done)


def _hashed(plan: Plan, shard: int) -> Iterator[tuple[tuple[str, str], bytes]]:
    for item in plan.items_of(plan.numbers(shard)):
        try:
            digest = sha256(item.read()).digest()
        except InputError:
            digest = b""
        yield (item.key, str(item.kind)), digest


def _embed_all(
    model: Model,
    plan: Plan,
    out: Path,
    receipts: dict[int, ShardReceipt],
    todo: Sequence[int],
    readers: int | None,
    progress: Progress,
) -> None:
    if not todo:
        return
    start = time.perf_counter()
    progress.started("embed", sum(len(plan.numbers(shard)) for shard in todo), "inputs")

    def advanced(done: int, bad: int) -> None:
        progress.advanced(done, None, f"{bad} in quarantine" if bad else "")

    with closing(embed_shards(model, plan, todo, readers, advanced)) as contents:
        for shard, content in contents:
            receipts[shard] = save_shard(plan, out, shard, content)
    progress.finished("embed", time.perf_counter() - start)


def save_shard(plan: Plan, out: Path, shard: int, content: Content) -> ShardReceipt:
    """Write a shard, whole or not at all; BuildError if it cannot be."""
    numbers = sorted(content.rows)
    counts = [len(content.rows[i]) for i in numbers]
    vectors = np.concatenate(
        [np.zeros((0, plan.embedding.width), plan.embedding.dtype), *(content.rows[i] for i in numbers)]
    )
    receipt = ShardReceipt(
        plan.embedding,
        plan.digest,
        shard,
        plan.shards,
        len(content.items),
        content.inputs,
        len(vectors),
        tuple(
            Quarantined(printable(content.items[i][0]), content.items[i][1], why)
            for i, why in content.bad.items()
        ),
        plan.versions,
    )
    repeated = [i for i, count in zip(numbers, counts, strict=True) for _ in range(count)]
    columns: dict[str, Any] = {
        "vector": vectors,
        "key": [content.items[i][0] for i in repeated],
        "kind": [content.items[i][1] for i in repeated],
        "sha256": [content.digests[i] for i in repeated],
    }
    if plan.embedding.tiles:
        columns["tile"] = [tile for count in counts for tile in range(count)]
    path = path_of(out, shard)
    with writing(path):
        write_shard(path, receipt, columns)
    return receipt


def _finish(plan: Plan, out: Path, receipts: dict[int, ShardReceipt]) -> None:
    """Write the quarantine, which a finished folder has, and flush the folder."""
    lines = [
        json.dumps(asdict(item), ensure_ascii=False, sort_keys=True) + "\n"
        for shard in range(plan.shards)
        for item in receipts[shard].quarantine
    ]
    data = "".join(lines).encode()
    path = out / QUARANTINE
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)
    with writing(out):
        flush(out)
