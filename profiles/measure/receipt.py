"""The receipt of a profile: measurements, their subject and the machine; written and read as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engines.device import HOST
from ...errors import InputError, IntegrityError
from ...files.json import decode, read_json
from ...files.write import write_text
from ..cost.flops import ComponentCost
from ..cost.table19 import Table19
from .cases import Case
from .ceilings import Ceilings
from .layer_profile import LayerProfile
from .machine import Machine
from .sensors import Clocks
from .timing import StopRule

SCHEMA = "ivl-export.profile/3"
FIX = "Write it again with this release: ivl-export profile BUNDLE --out RECEIPT."
_KEYS = {"bundle": "subject"}
"""Entries of the receipt that have another name than the field they fill."""


@dataclass(frozen=True)
class Subject:
    """The bundle that was profiled; its manifest's hash covers every file of it."""

    name: str
    manifest_sha256: str
    model: str
    parameters: int
    recipe: str
    compute_dtype: str
    image_size: int | None = None


@dataclass(frozen=True)
class Settings:
    """How it was profiled. ``threads`` None: the backend's own choice; ``lengths``: the requested ones.

    ``device`` is where the engines computed, in torch's words (``cpu``, ``cuda:0``).
    """

    backend: str
    target: str | None
    threads: int | None
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    stop: StopRule
    device: str = HOST

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU computed."""
        return self.device == HOST


@dataclass(frozen=True)
class Startup:
    """From a bundle's folder to the first answer.

    Args:
        first_request_ms: of the first request of all, ``boundary`` says from where to where.
        load_seconds: opening each component's engine.
        first_call_ms: each engine's first call, when kernels are chosen and memory is taken.
    """

    boundary: str
    first_request_ms: float
    load_seconds: dict[str, float]
    first_call_ms: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """Everything measured and counted.

    ``costs`` has one entry for each component and sizes that a case called, ``notes`` name missing ones and
    the reasons. ``peak_memory_bytes`` is the whole process' (host memory), ``peak_device_bytes`` what the
    GPU in use memory's growth, by all processes; None without one. ``layers``: none unless they were timed.
    """

    created: str
    subject: Subject
    settings: Settings
    machine: Machine
    clocks: Clocks
    versions: dict[str, str]
    commit: str | None
    startup: Startup
    peak_memory_bytes: int | None
    peak_device_bytes: int | None
    cases: tuple[Case, ...]
    costs: tuple[ComponentCost, ...]
    ceilings: Ceilings | None
    table19: Table19 | None
    notes: tuple[str, ...]
    layers: tuple[LayerProfile, ...] = ()

    def cost(self, case: Case) -> ComponentCost | None:
        """FLOPs and bytes of one call of a component case; None if not counted."""
        if case.kind != "component":
            return None
        return next((c for c in self.costs if c.component == case.name and c.sizes == case.sizes), None)

    def of_kind(self, kind: str) -> tuple[Case, ...]:
        """The cases of one kind, in order."""
        return tuple(case for case in self.cases if case.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """The receipt: plain data with the schema's name, raw samples included."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "bundle": asdict(self.subject),
            "settings": asdict(self.settings),
            "machine": asdict(self.machine),
            "clocks": asdict(self.clocks),
            "versions": self.versions,
            "commit": self.commit,
            "startup": asdict(self.startup),
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "cases": [case.to_json() for case in self.cases],
            "costs": [cost.to_json() for cost in self.costs],
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "table19": None if self.table19 is None else self.table19.to_json(),
            "notes": list(self.notes),
            "layers": [layer.to_json() for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Any) -> Profile:
        """Read plain data; InputError names the first entry that is not as the schema says."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise InputError(
                "This is not a profile that this release reads.",
                f"Its schema is {schema!r}, not {SCHEMA!r}.",
                FIX,
            )
        entries = {_KEYS.get(key, key): value for key, value in data.items()}
        return decode(cls, entries, what="The receipt", fix=FIX, error=InputError, ignore_unknown=True)


def read(path: Path) -> Profile:
    """The profile in ``path``; InputError if it cannot be read or is none."""
    try:
        return Profile.from_json(read_json(path))
    except OSError as error:
        raise InputError(f"Cannot read {path}.", error.strerror or str(error), "Check the path.") from error
    except IntegrityError as error:
        raise InputError(error.what, error.why, "Give a receipt that 'profile --out' wrote.") from error
    except InputError as error:
        raise InputError(f"{path}: {error.what}", error.why, error.fix) from error


def write(receipt: Any, out: Path) -> None:
    """Write plain data as JSON, whole or not at all; BuildError if the file system refuses."""
    write_text(json.dumps(receipt, allow_nan=False) + "\n", out)
