"""Chat models in calibration: what is run, and that blocks one at a time are the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ivl_export.calibration.accuracy import component_accuracy
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.chain import Runner, run_chain, torch_runner
from ivl_export.calibration.chat import ChatBatch, Dialogue, chat_batches, dialogue_of, runs
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.recording import Recording
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.conversation import SYSTEM
from ivl_export.export.components import component_module, component_spec
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.pipeline.request import nano_chat_folder
from ivl_export.preprocess import ImageSettings, Tokenizer

TOKENIZER = Tokenizer(nano_chat_folder() / "tokenizer.model")


@pytest.fixture(scope="module", params=["nano-chat", "with queries"])
def checkpoint(request: pytest.FixtureRequest, query_chat: Path) -> Checkpoint:
    return open_checkpoint(nano_chat_folder() if request.param == "nano-chat" else query_chat)


@pytest.fixture(scope="module")
def settings(checkpoint: Checkpoint) -> ImageSettings:
    return ImageSettings.load(checkpoint.path / "preprocessor_config.json")


@pytest.fixture(scope="module")
def chosen() -> CalibrationSet:
    return scenes_calibration(5)


@pytest.fixture(scope="module")
def modules(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    found = {}
    for name in checkpoint.components:
        with torch.device("meta"):
            found[name] = component_module(name, checkpoint.model)
        load_state(found[name], checkpoint, torch.float32)
    return found


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, modules: dict[str, torch.nn.Module]) -> dict[str, Runner]:
    """Components that run at once, in torch."""
    return {n: torch_runner(m, component_spec(n, checkpoint.model)) for n, m in modules.items()}


def test_dialogues_are_about_their_scenes(chosen: CalibrationSet) -> None:
    for sample in chosen.samples:
        said = dialogue_of(sample, TOKENIZER)
        assert said == dialogue_of(sample, TOKENIZER)
        assert TOKENIZER.decode(said.before).startswith(SYSTEM)
        asked = TOKENIZER._sp.decode([i for i in said.after if i != TOKENIZER.eos])
        assert asked.endswith("ASSISTANT:")
        assert asked.count("USER:") == said.after.count(TOKENIZER.eos)
        assert said.answer
        assert TOKENIZER.eos not in said.answer


def test_runs_of_equal_lengths() -> None:
    same, other = Dialogue((1, 2), (3,), (4, 5)), Dialogue((1, 2), (3, 6), (4,))
    found = list(runs([same, other, same]))
    assert [(r.rows, r.ids.tolist(), r.cut) for r in found] == [
        ([0, 2], [[1, 2, 3]] * 2, 2),
        ([0, 2], [[4, 5]] * 2, None),
        ([1], [[1, 2, 3, 6]], 2),
        ([1], [[4]], None),
    ]
    assert [r.length(10) for r in found] == [13, 2, 14, 1]


def test_a_recording_is_what_the_whole_model_gives(
    checkpoint: Checkpoint,
    settings: ImageSettings,
    chosen: CalibrationSet,
    whole: dict[str, Runner],
    tmp_path: Path,
) -> None:
    recording = Recording(
        checkpoint, checkpoint.components, chosen, settings, TOKENIZER, tmp_path, batch_size=3
    )
    count = 0
    for batch, steps in recording:
        want = list(run_chain(whole, batch))
        assert [s.component for s in steps] == [s.component for s in want]
        for got, expected in zip(steps, want, strict=True):
            component_spec(got.component, checkpoint.model).check(got.inputs)
            for part in ("inputs", "outputs"):
                mine, theirs = getattr(got, part), getattr(expected, part)
                assert set(mine) == set(theirs)
                for name in theirs:
                    np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=2e-4, err_msg=name)
        count += len(batch.pixel_values)
    assert count == 5
    forced, chained = component_accuracy(recording, whole)
    for table in (forced, chained):
        assert set(table) == set(checkpoint.components)
        assert min(m.cosine for outputs in table.values() for m in outputs.values()) > 0.99999


def test_ranges_are_those_of_the_whole_model(
    checkpoint: Checkpoint,
    settings: ImageSettings,
    chosen: CalibrationSet,
    modules: dict[str, torch.nn.Module],
    tmp_path: Path,
) -> None:
    scales = calibrate(
        checkpoint, checkpoint.components, chosen, settings, TOKENIZER, batch_size=2, folder=tmp_path / "s"
    )
    seen: dict[str, dict[str, float]] = {name: {} for name in modules}
    hooks = []
    for component, module in modules.items():
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):

                def hook(_: object, args: tuple[torch.Tensor], c: str = component, n: str = name) -> None:
                    seen[c][n] = max(seen[c].get(n, 0.0), float(args[0].abs().max()))

                hooks.append(layer.register_forward_pre_hook(hook))
    runners = {n: torch_runner(m, component_spec(n, checkpoint.model)) for n, m in modules.items()}
    llama = checkpoint.whole.llama
    for batch in chat_batches(chosen, settings, TOKENIZER, llama, 2):
        assert isinstance(batch, ChatBatch)
        assert list(run_chain(runners, batch))
    for handle in hooks:
        handle.remove()
    for component, layers in seen.items():
        for name, amax in layers.items():
            assert scales.amax[component][name] == pytest.approx(amax, rel=1e-4), name
