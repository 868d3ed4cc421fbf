"""Calibration block by block: the same ranges as whole modules, also after it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ivl_export.calibration.activation_store import Spill
from ivl_export.calibration.calibrate import (
    SegmentTime,
    calibrate,
    calibration_seconds,
    calibration_units,
    seconds_per_block,
    spilled_bytes,
)
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.errors import BuildError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer, Tokenizer
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.models.config import InternVLConfig
from ivl_export.models.shipped import nano_folder
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.tests.calibration.reference import whole_amax

Sets = tuple[CalibrationSet, CalibrationSet]
ALL = ("vision", "qllama_query", "qllama_text", "qllama_step")

KILLED = """
import os, signal, sys
from pathlib import Path
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer

model, tokenizer, folder, at = sys.argv[1:]

def progress(done):
    if done >= int(at):
        os.kill(os.getpid(), signal.SIGKILL)

calibrate(
    open_checkpoint(model), ["vision", "qllama_query", "qllama_text", "qllama_step"],
    scenes_calibration(20).split(4)[0], ImageSettings(size=28), SentencePieceTokenizer(tokenizer),
    batch_size=4, folder=Path(folder), progress=progress,
)
"""


@pytest.mark.parametrize("components", [ALL, ("qllama_text",), ("qllama_query",)])
def test_nano_scales_equal_those_of_whole_modules(components: tuple[str, ...], tmp_path: Path) -> None:
    folder = nano_folder()
    checkpoint = open_checkpoint(folder)
    settings = ImageSettings.load(folder / "preprocessor_config.json")
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    chosen = scenes_calibration(11)
    spill = tmp_path / "spill"
    ranges = calibrate(checkpoint, components, chosen, settings, tokenizer, batch_size=4, folder=spill)
    assert ranges.amax == whole_amax(checkpoint, components, chosen.batches(settings, tokenizer, 4))
    assert not spill.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "component"),
    [("percentile", "qllama_query"), ("entropy", "vision"), ("mse", "qllama_query")],
)
def test_picked_ranges_equal_those_of_whole_modules(
    algorithm: str,
    component: str,
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    kinds = {f"vision_model.encoder.layers.{i}.attn.qkv": kind for i, kind in enumerate(("int8", "fp8"))}
    components = (component,)
    ranges = calibrate(
        checkpoint, components, scenes[0], settings, tokenizer, algorithm=algorithm, kinds=kinds
    )
    batches = scenes[0].batches(settings, tokenizer)
    assert ranges.amax == whole_amax(checkpoint, components, batches, algorithm, kinds)
    layers = {name: kind for name, kind in ranges.kinds.items() if name in ranges.shapes}
    assert layers == ({} if algorithm == "percentile" else kinds)


@pytest.mark.slow
@pytest.mark.parametrize("at", [16 * 2 + 5, 16 * 4, 16 * 6 + 9])
def test_a_killed_run_goes_on_at_its_block(
    at: int,
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    """Within a block of InternViT, at the end of a part, and within a layer of QLLaMA."""
    model, folder = tmp_path / "tokenizer.model", tmp_path / "spill"
    model.write_bytes(tokenizer.files["tokenizer.model"])
    command = [sys.executable, "-c", KILLED, str(checkpoint.path), str(model), str(folder), str(at)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    parts_done = json.loads((folder / "state.json").read_text())["done"]
    assert parts_done == (at - 1) // 16, "the part that was running does not count"

    heard: list[int] = []
    ran: list[SegmentTime] = []
    ranges = calibrate(
        checkpoint,
        ALL,
        scenes[0],
        settings,
        tokenizer,
        batch_size=4,
        folder=folder,
        progress=heard.append,
        timed=ran.append,
    )
    assert heard[0] > parts_done * 16
    assert len(ran) == calibration_units(checkpoint.config, ALL, 1) - parts_done
    assert ranges == calibrate(checkpoint, ALL, scenes[0], settings, tokenizer, batch_size=4)


def test_another_set_or_lost_activations_start_afresh(
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "spill"

    class Stopped(Exception):
        pass

    def stop(count: int) -> None:
        if count > 3 * 16:
            raise Stopped

    def run(chosen: CalibrationSet, stopped: bool = False) -> tuple[ActivationRanges | None, int]:
        ran: list[SegmentTime] = []
        try:
            ranges = calibrate(
                checkpoint,
                ["vision"],
                chosen,
                settings,
                tokenizer,
                batch_size=4,
                folder=folder,
                progress=stop if stopped else lambda count: None,
                timed=ran.append,
            )
        except Stopped:
            return None, len(ran)
        return ranges, len(ran)

    assert run(scenes[0], stopped=True) == (None, 3)
    whole, parts = run(scenes[1])
    assert parts == 4, "embeddings, two blocks, the head: none of the other set's"
    assert whole == calibrate(checkpoint, ["vision"], scenes[1], settings, tokenizer, batch_size=4)

    run(scenes[0], stopped=True)
    for file in folder.glob("states-vision.*"):
        file.unlink()
    assert run(scenes[0])[1] == 4


def test_spilled_bytes_bound_the_files_on_disk(
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    folder, most = tmp_path / "spill", 0

    def look(count: int) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_size for p in folder.glob("states-*")))

    calibrate(checkpoint, ALL, scenes[0], settings, tokenizer, folder=folder, progress=look)
    bound = spilled_bytes(checkpoint.config, ALL, 16)
    assert bound / 4 < most <= bound


def test_a_small_disk_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="not enough disk space for the activations"):
        Spill(tmp_path, "states", [(1 << 20, 1 << 20, 8)])


def test_estimate() -> None:
    times = [
        SegmentTime("vision", None, 9.0, 4),
        SegmentTime("vision", 0, 8.0, 4),
        SegmentTime("vision", 1, 4.0, 4),
        SegmentTime("qllama", 0, 2.0, 4),
    ]
    per_block = seconds_per_block(times)
    assert per_block == {"vision": 1.5, "qllama": 0.5}
    one = calibration_seconds(InternVLConfig(), per_block, 512)
    assert one == 512 * (48 * 1.5 + 32 * 0.5)
    assert calibration_seconds(InternVLConfig(), per_block, 512, devices=20, speedup=2) == 26 * 88 / 2
