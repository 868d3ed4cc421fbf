"""Runs the numeric tests as other processors would: other instruction sets, threads, last places.

A tolerance that only holds where it was written fails here first::

    python -m ivl_export.tests.tools.numerics                          # all numeric tests, all settings
    python -m ivl_export.tests.tools.numerics --settings sse,ulp tests/models -k golden

Everything after the options goes to pytest. Each setting is a separate process: the libraries read these
variables when they are loaded. One row a setting is printed, with the largest part of a tolerance that a test
used, and below it the tests that failed; at the end those that used over a third. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


HEADROOM, PROPERTY = "ivl_export.tests.tools.headroom", "tolerance_used"
"""The plugin that every setting runs with, and its report."""
MOST = 1 / 3
"""Part of a tolerance; tests that use more are listed."""


@dataclass(frozen=True)
class Setting:
    """Settings of one run.

    Args:
        says: for the table.
        environment: variables, set before anything is imported.
        plugin: a pytest plugin, or "".
    """

    says: str
    environment: dict[str, str] = field(default_factory=dict)
    plugin: str = ""


SETTINGS = {
    "native": Setting("this processor, one thread", {"OMP_NUM_THREADS": "1"}),
    "threads": Setting("this processor, two threads", {"OMP_NUM_THREADS": "2"}),
    "avx2": Setting(
        "no AVX-512, no AMX in PyTorch",
        {
            "OMP_NUM_THREADS": "1",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_CBWR": "AVX2",
        },
    ),
    "sse": Setting(
        "no AVX in PyTorch",
        {
            "OMP_NUM_THREADS": "1",
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_CBWR": "COMPATIBLE",
        },
    ),
    "ulp": Setting(
        "inputs of ONNX Runtime in other last places",
        {"OMP_NUM_THREADS": "1"},
        "ivl_export.tests.tools.one_ulp",
    ),
}


@dataclass(frozen=True)
class Result:
    """Of one setting: counts of tests by outcome, seconds, failures, and the part of a tolerance that each
    used.

    ``used``: the largest part of a tolerance, for each test.
    """

    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: tuple[str, ...]
    used: dict[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Tests ran, and none failed."""
        return self.passed > 0 and self.failed == 0


def run(setting: Setting, tests: Sequence[str]) -> Result:
    """Run the numeric ones of ``tests`` (pytest's arguments) in a process under ``setting``."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-m", "numeric"]
        plugins = (HEADROOM, setting.plugin) if setting.plugin else (HEADROOM,)
        command += [f"--junitxml={report}", *(text for name in plugins for text in ("-p", name))]
        process = subprocess.run(
            [*command, *tests],
            cwd=ROOT,
            env=outside | setting.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not report.is_file():
            raise SystemExit(f"pytest did not run:\n{process.stdout}")
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    tests_run, skipped = (sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "skipped"))
    cases = {
        "::".join(filter(None, (case.get("classname"), case.get("name")))): case
        for suite in suites
        for case in suite.iter("testcase")
    }
    failures = tuple(
        name
        for name, case in cases.items()
        if case.find("failure") is not None or case.find("error") is not None
    )
    used = {
        name: float(entry.get("value", 0))
        for name, case in cases.items()
        for entry in case.iter("property")
        if entry.get("name") == PROPERTY
    }
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    return Result(tests_run - skipped - len(failures), len(failures), skipped, seconds, failures, used)


def main(args: Sequence[str]) -> int:
    """Run, print the table, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    options, tests = parser.parse_known_args(args)
    names = options.settings.split(",")
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"no setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
    print(
        f"{'setting':8} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8} {'used':>6}  what differs"
    )
    results = {}
    for name in names:
        result = results[name] = run(SETTINGS[name], tests)
        numbers = f"{result.passed:7} {result.failed:7} {result.skipped:8} {result.seconds:8.1f}"
        numbers += f" {max(result.used.values(), default=0):6.0%}"
        print(f"{name:8} {numbers}  {SETTINGS[name].says}", flush=True)
        for failure in result.failures:
            print(f"{name}: {failure}", flush=True)
    for name, result in results.items():
        for test, part in sorted(result.used.items(), key=lambda entry: -entry[1]):
            if part > MOST:
                print(f"{name} uses {part:.0%} of a tolerance: {test}")
    return 0 if all(result.good for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
