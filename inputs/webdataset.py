"""WebDataset shards: tar files in which ``0001.jpg`` and ``0001.txt`` (or ``0001.json``) belong together.

Headers are walked once, contents are read in place: nothing is unpacked. Archives are untrusted: member
names never become paths, links and other special files are refused.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files.lfs import refuse_lfs_pointer
from ..files.read import MAX_FILE_BYTES
from ..files.text import decode_text

MAX_SHARDS = 100_000
MAX_CAPTION_BYTES = 8192
CAPTION_KEYS = ("caption", "text", "txt")
"""In the JSON of a sample, the first of these that holds a text."""

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class Member:
    """A plain file in an uncompressed tar.

    Args:
        shard: the tar.
        name: of the member, for messages.
        offset, size: place of its bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; InputError if they are not there, or too many."""
        if self.size > MAX_FILE_BYTES:
            raise InputError(
                f"{self.name} in {self.shard} is refused.", f"It is larger than {MAX_FILE_BYTES >> 20} MiB."
            )
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(f"Cannot read {self.shard}.", error.strerror or str(error)) from error
        if len(data) != self.size:
            raise InputError(f"{self.name} in {self.shard} is cut off.", fix="Download the shard again.")
        return data


def braced(pattern: str) -> list[str]:
    """``a-{000..011}.tar`` and ``{a,b}.tar`` expanded to names, in order."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        if int(last) - int(first) >= MAX_SHARDS:
            raise InputError(f"{pattern} names over {MAX_SHARDS:,} shards.")
        options = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        options = names.split(",")
    head, tail = pattern[: match.start()], braced(pattern[match.end() :])
    if len(options) * len(tail) > MAX_SHARDS:
        raise InputError(f"{pattern} names over {MAX_SHARDS:,} shards.")
    return [f"{head}{option}{rest}" for option, rest in itertools.product(options, tail)]


@dataclass(frozen=True)
class Caption:
    """Reads the caption of a sample: its ``.txt``, or an entry of its ``.json``."""

    text: Member | None
    data: Member | None
    key: str | None

    def __call__(self) -> str | None:
        """The caption; None where the sample has none. InputError if it cannot be read."""
        if self.text is not None and self.key is None:
            return _decoded(self.text)[:MAX_CAPTION_BYTES]
        if self.data is None:
            return None
        try:
            row = json.loads(_decoded(self.data))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.data.name} is not JSON.", str(error)) from error
        keys = (self.key,) if self.key is not None else CAPTION_KEYS
        captions = [row[k] for k in keys if isinstance(row, dict) and isinstance(row.get(k), str)]
        return captions[0] if captions else None


def _decoded(member: Member) -> str:
    try:
        return decode_text(member.read())
    except UnicodeDecodeError as error:
        raise InputError(f"{member.name} is not UTF-8.", str(error)) from error


def members(shard: Path) -> Iterator[Member]:
    """The regular, visible files in a tar, in order; InputError for a link, a device or a broken archive."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                where = f"{shard}: member {info.name[:200]!r}"
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise InputError(
                        f"{where} is refused.",
                        "It is not a regular file (a link, a device).",
                        "Pack the shard again with regular files.",
                    )
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    raise InputError(f"{where} is refused.", "Its name leaves the archive.")
                if not info.name.rpartition("/")[2].startswith("."):
                    yield Member(shard, info.name, info.offset_data, info.size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    except (OSError, tarfile.TarError, ValueError) as error:
        refuse_lfs_pointer(shard)
        raise InputError(
            f"{shard} cannot be read as a shard.",
            f"{error}.",
            "Shards are uncompressed tar files; unpack them first (gunzip).",
        ) from error


def sample_key(name: str) -> tuple[str, str]:
    """The sample's key, and the suffix: all after the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()
