"""Error types. Each says what happened, why, and what to do, and carries a process exit code.

The command line prints the three parts and exits with ``exit_code``; embedders catch ``IvlError``.
"""

from __future__ import annotations


class IvlError(Exception):
    """Base of all errors this package raises on purpose.

    Args:
        what: what happened, one sentence.
        why: the cause, with the offending name, path or value.
        fix: the remedy, a command where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(" ".join(part for part in (what, why, fix) if part))

    def to_json(self) -> dict[str, str | int]:
        """The error as printed under ``--json``."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "why": self.why,
            "fix": self.fix,
            "exit_code": self.exit_code,
        }


class UsageError(IvlError):
    """A flag or argument that cannot be right (unknown precision, unknown target)."""

    exit_code = 2


class InputError(IvlError):
    """Images, captions or a calibration set that cannot be used."""

    exit_code = 3


class TooLargeError(InputError):
    """An image, or a request, that is over a limit of size."""


class TooLongError(InputError):
    """A prompt with its answer that is longer than the model, or the bundle, can take."""


class CheckpointError(IvlError):
    """Weights or config that are missing, unexpected, truncated or of the wrong shape."""

    exit_code = 4


class CapabilityError(IvlError):
    """Something this machine, target or installation cannot do (no library, no FP8 on the target)."""

    exit_code = 5


class BuildError(IvlError):
    """Export, quantisation or engine build failed, or a precision promise was broken."""

    exit_code = 6


class AccuracyError(IvlError):
    """A measured loss is over its budget."""

    exit_code = 7


class LatencyError(IvlError):
    """A measured time grew by more than its limit."""

    exit_code = 9


class IntegrityError(IvlError):
    """A bundle, archive or cache entry whose hash, size or path differs from its manifest."""

    exit_code = 8


class BusyError(IvlError):
    """A service that takes no more requests now, or could not finish one in time."""


class TimeLimitError(BusyError):
    """A request that was not done in its time."""
