"""The wheelhouse: complete for its target, installs without an index, and never partial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

import ivl_export
from ivl_export.errors import BuildError, UsageError
from ivl_export.packages import wheelhouse
from ivl_export.packages.distribution import PROJECT, WHEEL, environment
from ivl_export.packages.wheelhouse import Target, missing, platforms
from ivl_export.tests.packages.conftest import Pack

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel_of(folder: Path, name: str, version: str, *requirements: str) -> Path:
    """A wheel that has nothing but metadata."""
    file = folder / f"{name}-{version}-py3-none-any.whl"
    needs = "".join(f"Requires-Dist: {text}\n" for text in requirements)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


def test_older_platforms_are_told_to_pip() -> None:
    assert platforms("win_amd64") == ["win_amd64"]
    known = platforms("manylinux_2_17_aarch64")
    assert known[0] == "manylinux_2_17_aarch64"
    assert {"manylinux_2_5_aarch64", "manylinux2014_aarch64", "manylinux1_aarch64"} <= {*known}
    assert "manylinux_2_18_aarch64" not in known
    assert "manylinux2014_x86_64" not in platforms("manylinux_2_12_x86_64")


def test_options_of_pip_are_those_of_the_target() -> None:
    assert list(Target(HERE, None).options()) == ["--only-binary", ":all:"]
    options = list(Target("3.13", "win_amd64").options())
    assert options[2:] == ["--python-version", "3.13", "--implementation", "cp", "--platform", "win_amd64"]
    windows = Target("3.13", "win_amd64").environment
    assert (windows["sys_platform"], windows["platform_machine"]) == ("win32", "AMD64")
    assert Target("3.12", "macosx_14_0_arm64").environment["platform_machine"] == "arm64"
    assert Target("3.12", "manylinux_2_28_aarch64").environment["sys_platform"] == "linux"


def test_what_only_the_target_needs_is_missing_until_it_is_there(tmp_path: Path) -> None:
    wheel_of(
        tmp_path, "ivl_export", "0.1.0",
        "a>=2", 'b[more]; extra == "cpu"', 'never; extra == "train"', 'old; python_version < "3.11"',
    )  # fmt: skip
    wheel_of(tmp_path, "a", "1.5", 'colorama; sys_platform == "win32"')
    wheel_of(tmp_path, "b", "3.0rc1", 'c; extra == "more"', "d!")
    linux, windows = environment("3.11"), environment("3.11", "win32", "AMD64")
    assert {name: str(r) for name, r in missing(tmp_path, ["cpu"], linux).items()} == {
        "a": "a>=2", "c": 'c; extra == "more"'
    }  # fmt: skip
    wheel_of(tmp_path, "c", "1")
    (tmp_path / "a-1.5-py3-none-any.whl").unlink()
    wheel_of(tmp_path, "a", "2.1", 'colorama; sys_platform == "win32"')
    assert missing(tmp_path, ["cpu"], linux) == {}
    assert {*missing(tmp_path, ["cpu"], windows)} == {"colorama"}
    assert {*missing(tmp_path, ["cpu"], environment("3.10"))} == {"old"}
    assert {*missing(tmp_path, ["cpu", "train"], linux)} == {"never"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip has instead of an index; the package's own wheel is a made-up one."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    needs = ("ivl-a", 'ivl-b; extra == "cpu"')
    version = ivl_export.__version__
    monkeypatch.setattr(
        wheelhouse, "write_wheel", lambda out: wheel_of(out.parent, "ivl_export", version, *needs)
    )
    return folder


def test_wheels_for_another_platform_are_downloaded_until_none_is_missing(
    index: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    wheel_of(index, "ivl_a", "1.0", 'ivl-w; sys_platform == "win32"')
    wheel_of(index, "ivl_b", "2.0")
    wheel_of(index, "ivl_w", "3.0", "ivl-x")
    wheel_of(index, "ivl_x", "4.0")
    settings = {"extras": "none", "platform": "win_amd64", "python": "3.13"}
    package = ivl_export.package(tiny_bundle, tmp_path / "p", format="wheelhouse", settings=settings)
    names = {parse_wheel_filename(p.name)[0] for p in (package.root / "wheels").iterdir()}
    assert names == {PROJECT, "ivl-a", "ivl-b", "ivl-w", "ivl-x"}
    assert {f"wheels/{p.name}" for p in (package.root / "wheels").iterdir()} <= {*package.files}
    assert "Python 3.13 on win_amd64" in (package.root / "README.md").read_text()
    assert os.access(package.root / "install.sh", os.X_OK)


def test_a_download_that_fails_leaves_nothing_and_says_what(
    index: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    wheel_of(index, "ivl_a", "1.0")
    with pytest.raises(BuildError, match=r"ivl-b.*Check the network") as caught:
        ivl_export.package(tiny_bundle, tmp_path / "p", format="wheelhouse", settings=["extras=none"])
    assert "Traceback" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"index"}


def test_a_dry_run_downloads_nothing_and_says_what_it_would(
    index: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    planned = ivl_export.package(tiny_bundle, tmp_path / "p", format="wheelhouse", dry_run=True)
    assert planned.files[f"wheels/{WHEEL}"] is None
    assert "onnxruntime==" in planned.pending[0]
    assert "fastapi==" in planned.pending[0]
    assert not (tmp_path / "p").exists()


def test_settings_that_cannot_be(pack: Pack, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no extra 'sreve'.*serve"):
        pack(tiny_bundle, "wheelhouse", settings=["extras=sreve"])
    with pytest.raises(UsageError, match="python does not take"):
        pack(tiny_bundle, "wheelhouse", settings=["python=3.9"])


@pytest.mark.slow
def test_it_installs_in_a_fresh_environment_without_an_index(
    pack: Pack, tiny_bundle: Path, photo: Path
) -> None:
    """As a user does it: real wheels of the base and the extra ``cpu``, from the index that pip knows."""
    root = pack(tiny_bundle, "wheelhouse", name="tiny", settings=["extras=none", f"python={HERE}"]).root
    assert not list((root / "wheels").glob("torch-*"))
    nowhere = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    nowhere |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["sh", "install.sh"], cwd=root, env=nowhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    command = [str(root / "venv" / "bin" / PROJECT), "run", "caption", "bundle", str(photo), "--json"]
    ran = subprocess.run(command, cwd=root, env=nowhere, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with ivl_export.load(tiny_bundle) as model:
        assert model.caption([photo])[0] in json.dumps(json.loads(ran.stdout), ensure_ascii=False)
    wrong = {**nowhere, "PYTHON": "false"}
    refused = subprocess.run(
        ["sh", "install.sh", "other"], cwd=root, env=wrong, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: these wheels are for Python")
    assert not (root / "other").exists()
