"""WebDataset shards (:mod:`..inputs.webdataset`) as candidates for a calibration set."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..inputs.images import IMAGE_SUFFIXES
from ..inputs.webdataset import Caption, Member, members, sample_key
from .entries import MAX_ENTRIES, Entry


def shard_entries(shards: list[Path], caption: str | None = None) -> list[Entry]:
    """The images of ``shards``, each with the caption under its key.

    Args:
        shards: uncompressed tar files.
        caption: key of the caption in a sample's JSON; None: one of :data:`..inputs.webdataset.CAPTION_KEYS`.

    Raises:
        InputError: a shard that is missing, broken or compressed, or that holds a link, a device, or a name
            that leaves it.
    """
    names = [shard.name for shard in shards]
    entries: list[Entry] = []
    for shard in shards:
        label = shard.name if names.count(shard.name) == 1 else shard.as_posix()
        images: dict[str, Member] = {}
        texts: dict[str, Member] = {}
        for member in members(shard):
            key, suffix = sample_key(member.name)
            if suffix in IMAGE_SUFFIXES:
                images.setdefault(key, member)
            elif suffix in (".txt", ".json"):
                texts[f"{key}{suffix}"] = member
        for key, image in images.items():
            pair = texts.get(f"{key}.txt"), texts.get(f"{key}.json")
            entries.append(Entry(f"{label}/{image.name}", image, Caption(*pair, caption)))
        if len(entries) > MAX_ENTRIES:
            raise InputError(f"The shards have over {MAX_ENTRIES:,} images.", fix="Name fewer of them.")
    return entries
