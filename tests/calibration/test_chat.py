"""Chat models in calibration: the calls, and blocks one at a time equal the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivl_export.arrays import Array
from ivl_export.calibration.accuracy import Comparison, Metrics, component_accuracy
from ivl_export.calibration.calibrate import SegmentTime, calibrate, spilled_bytes
from ivl_export.calibration.component_chain import Runner, run_chain
from ivl_export.calibration.dataset import CalibrationSet, dialogue_of
from ivl_export.calibration.folding import fold, groups
from ivl_export.calibration.recording import Recording
from ivl_export.calibration.segments import Modules, segments, towers
from ivl_export.calibration.sensitivity import measure
from ivl_export.calibration.simulate import rounding_hook
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.inputs.chat_template import SYSTEM
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer, Tokenizer
from ivl_export.models import load_chat
from ivl_export.models.calls import Dialogue, runs
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.layout import CHAT_TOWER
from ivl_export.models.registry import component_module, component_of, component_spec
from ivl_export.models.shipped import nano_chat_folder
from ivl_export.quantization.attention import FP8_ATTENTION, attentions
from ivl_export.quantization.quantize import dequantise, quantise
from ivl_export.tests.calibration.reference import torch_runner

pytestmark = pytest.mark.numeric

TOKENIZER = SentencePieceTokenizer(nano_chat_folder() / "tokenizer.model")


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
    by_name = {}
    for name in checkpoint.components:
        with torch.device("meta"):
            by_name[name] = component_module(name, checkpoint.model)
        load_state(by_name[name], checkpoint, torch.float32)
    return by_name


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, modules: dict[str, torch.nn.Module]) -> dict[str, Runner]:
    """Components that run at once, in torch."""
    return {n: torch_runner(m, component_spec(n, checkpoint.model)) for n, m in modules.items()}


def test_dialogues_are_about_their_scenes(chosen: CalibrationSet) -> None:
    for sample in chosen.samples:
        said = dialogue_of(sample, TOKENIZER)
        assert said == dialogue_of(sample, TOKENIZER)
        assert TOKENIZER.decode(said.before).startswith(SYSTEM)
        request = TOKENIZER._sp.decode([i for i in said.after if i != TOKENIZER.eos])
        assert request.endswith("ASSISTANT:")
        assert request.count("USER:") == said.after.count(TOKENIZER.eos)
        assert said.answer
        assert TOKENIZER.eos not in said.answer


def test_runs_of_equal_lengths() -> None:
    same, other = Dialogue((1, 2), (3,), (4, 5)), Dialogue((1, 2), (3, 6), (4,))
    results = list(runs([same, other, same]))
    assert [(r.rows, r.ids.tolist(), r.cut) for r in results] == [
        ([0, 2], [[1, 2, 3]] * 2, 2),
        ([0, 2], [[4, 5]] * 2, None),
        ([1], [[1, 2, 3, 6]], 2),
        ([1], [[4]], None),
    ]
    assert [r.length(10) for r in results] == [13, 2, 14, 1]


@pytest.mark.slow
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
        want = list(run_chain(whole, batch, checkpoint.model))
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
    forced, chained = component_accuracy(recording, whole, checkpoint.model)
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
    for batch in chosen.batches(settings, TOKENIZER, 2):
        assert list(run_chain(runners, batch, checkpoint.model))
    for handle in hooks:
        handle.remove()
    for component, layers in seen.items():
        for name, amax in layers.items():
            assert scales.amax[component][name] == pytest.approx(amax, rel=1e-4), name


def test_each_weight_belongs_to_one_part(checkpoint: Checkpoint) -> None:
    """Memory follows a block because no weight is held twice or longer."""
    plan = segments(checkpoint.model, checkpoint.components)
    for component in checkpoint.components:
        own = [s for s in plan if component in {c.name for c in towers(checkpoint.model)[s.tower]}]
        loaded: list[str] = []

        def load(key: str, keys: list[str] = loaded) -> torch.Tensor:
            keys.append(key)
            return checkpoint.load(key)

        modules = Modules(checkpoint, [component], load)
        for segment in own:
            with modules.filled(segment):
                pass
        assert sorted(loaded) == sorted(modules.by_name[component].state_dict())


@pytest.mark.slow
def test_a_stopped_run_goes_on_at_its_part(
    checkpoint: Checkpoint, settings: ImageSettings, chosen: CalibrationSet, tmp_path: Path
) -> None:
    """Stopped anywhere: intermediate outputs of a tower are as safe as those of its end."""
    plan = segments(checkpoint.model, checkpoint.components)
    args = (checkpoint, checkpoint.components, chosen, settings, TOKENIZER)
    whole = calibrate(*args, batch_size=2)
    for stop in range(2, len(plan), 2):

        def stopped(count: int, stop: int = stop) -> None:
            if count > stop * len(chosen):
                raise KeyboardInterrupt

        folder, ran = tmp_path / str(stop), list[SegmentTime]()
        with pytest.raises(KeyboardInterrupt):
            calibrate(*args, batch_size=2, folder=folder, progress=stopped)
        assert calibrate(*args, batch_size=2, folder=folder, timed=ran.append) == whole
        assert len(ran) == len(plan) - stop


def test_files_on_disk_are_bounded(
    checkpoint: Checkpoint, settings: ImageSettings, chosen: CalibrationSet, tmp_path: Path
) -> None:
    folder, most = tmp_path / "spill", 0

    def look(count: int) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in folder.glob("states-*")))

    calibrate(checkpoint, checkpoint.components, chosen, settings, TOKENIZER, folder=folder, progress=look)
    assert 0 < most <= spilled_bytes(checkpoint.model, checkpoint.components, len(chosen))


def test_factors_fold_into_a_model_that_sees_the_same(checkpoint: Checkpoint) -> None:
    """Of every place in the tower that SmoothQuant and AWQ fold into."""
    model, generator = load_chat(checkpoint), torch.Generator().manual_seed(0)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and CHAT_TOWER in n]
    foldable = [name for name in names if not name.endswith(("self_attn.o_proj", "mlp.fc2"))]
    divisors = {}
    for source in sorted(groups(foldable)):
        width = checkpoint.tensors[f"{source}.weight"].shape[0] // (3 if source.endswith("qkv") else 1)
        divisors[source] = torch.exp2(torch.randint(-3, 4, (width,), generator=generator).float())
    size = checkpoint.model.image_size
    pixels = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        want, got = model.visual_embeds(pixels), load_chat(fold(checkpoint, divisors)).visual_embeds(pixels)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert len(divisors) >= 3 * 3


@pytest.mark.slow
def test_what_a_quantised_layer_loses(
    checkpoint: Checkpoint,
    settings: ImageSettings,
    chosen: CalibrationSet,
    modules: dict[str, torch.nn.Module],
    tmp_path: Path,
) -> None:
    """Every layer of all blocks is tried; one of each tower is quantised by hand in the whole model."""
    args = (chosen, settings, TOKENIZER)
    scales = calibrate(checkpoint, checkpoint.components, *args, batch_size=2)
    schemes = ("int8", FP8_ATTENTION)
    result = measure(checkpoint, checkpoint.components, schemes, scales, *args, tmp_path, batch_size=2)
    losses = {(x.component, x.layer): x for x in result.losses if x.scheme == "int8"}
    fused = {(x.component, x.layer) for x in result.losses if x.scheme == FP8_ATTENTION}
    known = attentions(checkpoint.model, checkpoint.components)
    assert fused == {(component, name) for component, names in known.items() for name in names}
    for component in (c for c in checkpoint.components if c != "decoder_embed"):
        blocks = f"{component_of(component, checkpoint.model).place(checkpoint.model)}."
        linears = {n for n, m in modules[component].named_modules() if isinstance(m, torch.nn.Linear)}
        own = {layer for c, layer in losses if c == component}
        assert own == {name for name in linears if name.startswith(blocks)}
        layer = max(name for name in own if name.endswith(("fc1", "gate_proj")))
        loss = losses[component, layer]
        want = by_hand(checkpoint, modules, component, layer, scales.amax[component][layer], args)
        assert loss.sqnr_db == pytest.approx(want.sqnr_db, abs=0.1), layer
        assert loss.samples == want.samples


def by_hand(
    checkpoint: Checkpoint,
    modules: dict[str, torch.nn.Module],
    component: str,
    layer: str,
    amax: float,
    args: tuple[CalibrationSet, ImageSettings, Tokenizer],
) -> Metrics:
    """The update by the block of ``layer`` with that layer in INT8, against fp32, in the whole model."""
    runners = {n: torch_runner(m, component_spec(n, checkpoint.model)) for n, m in modules.items()}
    linear = modules[component].get_submodule(layer)
    assert isinstance(linear, torch.nn.Linear)

    def added() -> list[Array]:
        seen: list[Array] = []

        def hook(_: object, given: tuple[torch.Tensor, ...], made: Any) -> None:
            seen.append(((made[0] if isinstance(made, tuple) else made) - given[0]).numpy())

        block = modules[component].get_submodule(layer.rsplit(".", 2)[0])
        with block.register_forward_hook(hook):
            for batch in args[0].batches(*args[1:], 2):
                assert list(run_chain(runners, batch, checkpoint.model))
        return seen

    plain, stored = added(), linear.weight
    linear.weight = torch.nn.Parameter(dequantise(*quantise(stored.detach(), "int8")), requires_grad=False)
    with linear.register_forward_pre_hook(rounding_hook(amax, "int8", "bf16")):
        rounded = added()
    linear.weight = stored
    compared = Comparison()
    for want, got in zip(plain, rounded, strict=True):
        compared.add(want, got)
    return compared.metrics()
