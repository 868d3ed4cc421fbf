"""Verification of finished embeddings: what is right passes, and every kind of fault is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivl_export.bulk.config import EmbedConfig, open_run, sample_of
from ivl_export.bulk.embed import save_shard
from ivl_export.bulk.verify import Verified, verify
from ivl_export.errors import IntegrityError, UsageError
from ivl_export.runtime.shards import open_shard
from ivl_export.tests.bulk.conftest import Embed, picture

pytestmark = pytest.mark.numeric


def verified(config: EmbedConfig, photos: Path, sample: int) -> Verified:
    model, plan = open_run(replace(config, sources=(photos,)))
    with model:
        return verify(model, plan, config.out, sample)


def test_a_finished_folder_is_right(embed: Embed, photos: Path, config: EmbedConfig) -> None:
    with pytest.raises(UsageError, match="no embeddings"):
        verified(config, photos, 5)
    embed(photos)
    for sample in (0, 1, 5, 100):
        result = verified(config, photos, sample)
        assert result.items == min(sample, 21)
        assert (result.rows, result.shards) == (20, 4)
        assert result.equal == result.vectors >= result.items - 1, "company changes no bits"
        assert result.furthest == 0


def test_every_fault_is_named(embed: Embed, photos: Path, config: EmbedConfig) -> None:
    embed(photos)
    kept = config.out.with_name("kept")
    shutil.copytree(config.out, kept)
    path = config.out / "shard-000001.parquet"
    block = open_shard(path).blocks[0]
    assert isinstance(block, np.memmap)
    place = block.offset + 37
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shard-000001.*CRC"):
        verified(config, photos, 0)
    # A wrong vector under a right checksum: only computing it again shows it.
    model, plan = open_run(replace(config, sources=(photos,)))
    with model:
        from ivl_export.bulk.embed import embed_shard

        content = embed_shard(model, plan, 1)
        content.rows[3] = -content.rows[3]
        save_shard(plan, config.out, 1, content)
        with pytest.raises(IntegrityError, match=r"has another vector than it should have"):
            verify(model, plan, config.out, 21)
        assert verify(model, plan, config.out, 0).rows == 20
        content.rows[3] = -content.rows[3]
        content.digests[3] = bytes(32)
        save_shard(plan, config.out, 1, content)
        with pytest.raises(IntegrityError, match="of another input"):
            verify(model, plan, config.out, 21)
        del content.rows[3]
        content.bad[3] = "not so"
        save_shard(plan, config.out, 1, content)
        with pytest.raises(IntegrityError, match="can be embedded now"):
            verify(model, plan, config.out, 21)
        path.unlink()
        with pytest.raises(IntegrityError, match="shard-000001"):
            verify(model, plan, config.out, 0)
        shutil.copy(kept / "shard-000002.parquet", path)
        with pytest.raises(IntegrityError, match="another plan"):
            verify(model, plan, config.out, 0)
        (config.out / "quarantine.jsonl").unlink()
        with pytest.raises(IntegrityError, match="not finished"):
            verify(model, plan, config.out, 0)
    (photos / "01.png").write_bytes(picture(77))
    with pytest.raises((UsageError, IntegrityError)):
        verified(replace(config, out=kept), photos, 21)


def test_a_sample_is_a_number_or_a_share() -> None:
    assert [sample_of(text, 1000) for text in ("0", "7", "5000", "1%", "100%", "0.01%")] == [
        0, 7, 1000, 10, 1000, 1
    ]  # fmt: skip
    for text in ("-1", "x", "101%", "nan%", "", "1e9999%"):
        with pytest.raises(UsageError, match="--verify"):
            sample_of(text, 1000)
    assert np.isfinite(sample_of("50%", 3))
