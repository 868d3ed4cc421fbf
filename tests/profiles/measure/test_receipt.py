"""Receipts: a written receipt is read, anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.errors import BuildError, InputError
from ivl_export.profiles.measure.receipt import Profile, read, write
from ivl_export.profiles.measure.sensors import Clocks, GpuClocks, Range, cpu_mhz, watch
from ivl_export.tests.profiles.made_profiles import made_case, made_cost, made_profile


@given(
    st.lists(st.floats(0.001, 1e6), min_size=1, max_size=30),
    st.booleans(),
    st.sampled_from([None, "a" * 40]),
)
def test_a_receipt_comes_back_as_it_was(samples: list[float], stable: bool, commit: str | None) -> None:
    gpu = GpuClocks("L40S", Range(300.0, 1000.0, 2520.0), None, None, None, 1, 2, ("heat",))
    profile = made_profile(
        [made_case(samples_ms=samples, stable=stable), made_case("caption", kind="chained", prompt=3)],
        [made_cost()],
        commit=commit,
        clocks=Clocks(None, 1.0, (gpu,)),
    )
    text = json.dumps(profile.to_json(), allow_nan=False)
    assert Profile.from_json(json.loads(text)) == profile


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(made_profile([made_case()], [made_cost()]).to_json()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("machine"), "machine"),
        (lambda d: d["machine"].update(cores="two"), r"machine\.cores"),
        (lambda d: d["machine"].update(cores=True), r"machine\.cores"),
        (lambda d: d["cases"][0].update(kind="guess"), r"cases\[0\].kind"),
        (lambda d: d["cases"][0]["measurement"].update(samples_ns=[1, 2.5]), r"samples_ns\[1\]"),
        (lambda d: d["cases"][0].update(sizes=[1]), r"cases\[0\].sizes"),
        (lambda d: d["startup"].update(first_request_ms=float("inf")), "first_request_ms"),
        (lambda d: d.update(cases={}), "cases"),
        (lambda d: d["bundle"].update(name="\x1b[2J"), "subject.name"),
        (lambda d: d.update(schema="ivl-export.profile/1"), "profile/1"),
    ],
)
def test_a_damaged_receipt_is_refused_by_name(change: Callable[[dict[str, Any]], object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Profile.from_json(damaged(change))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"a": 1, "a": 2}', "\xff"])
def test_what_is_no_receipt_is_said_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"some\.json.*profile.*--out"):
        read(path)
    with pytest.raises(InputError, match=r"missing\.json"):
        read(tmp_path / "missing.json")


def test_a_receipt_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "receipt.json"
    folder.mkdir()
    with pytest.raises(BuildError, match="Cannot write"):
        write({"schema": "x"}, folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["receipt.json"]


def test_sensors_are_read_while_the_block_runs() -> None:
    with watch(interval=0.001) as watched:
        pass
    assert watched.clocks is not None
    assert watched.clocks.gpus == ()
    text = "processor : 0\ncpu MHz\t\t: 2000.0\nprocessor : 1\ncpu MHz\t\t: 3000.0\n"
    assert cpu_mhz(text) == 2500.0
    assert cpu_mhz("BogoMIPS : 50") is None
    assert Range.of([3.0, 1.0, 2.0]) == Range(1.0, 2.0, 3.0)
    assert Range.of([]) is None


def test_a_gpu_is_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of the driver, which is not here: missing readings are left out, not guessed."""
    import pynvml

    used = iter([100, 300, 200] + [200] * 10_000)

    def refuse(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda handle: b"NVIDIA L40S",
        "nvmlDeviceGetClockInfo": lambda handle, kind: 2520 if kind == pynvml.NVML_CLOCK_SM else refuse(),
        "nvmlDeviceGetTemperature": lambda handle, kind: 61,
        "nvmlDeviceGetPowerUsage": refuse,
        "nvmlDeviceGetMemoryInfo": lambda handle: type("Info", (), {"used": next(used)}),
        "nvmlDeviceGetCurrentClocksThrottleReasons": (
            lambda handle: pynvml.nvmlClocksThrottleReasonSwPowerCap | 1
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    with watch(interval=0.001) as watched:
        while next(used) != 200:  # the thread takes the first ones
            pass
    assert watched.clocks is not None
    (gpu,) = watched.clocks.gpus
    assert (gpu.name, gpu.sm_mhz, gpu.memory_mhz) == ("NVIDIA L40S", Range(2520.0, 2520.0, 2520.0), None)
    assert (gpu.celsius, gpu.watts) == (Range(61.0, 61.0, 61.0), None)
    assert gpu.slowed_by == ("power limit",)
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    with watch() as nothing:
        pass
    assert nothing.clocks is not None
    assert nothing.clocks.gpus == ()


def test_device_memory_is_what_came_on_top() -> None:
    from ivl_export.profiles.measure.bundle_profile import _device_peak

    gpu = GpuClocks("L4", None, None, None, None, 100, 350, ())
    assert _device_peak(Clocks(None, None, (gpu, replace(gpu, peak_used_bytes=None)))) == 250
    assert _device_peak(Clocks(None, None, ())) is None
    assert _device_peak(None) is None
