"""The small graphs of the engine tests, which these share."""

from ivl_export.tests.engines.conftest import Make, Sample, make

__all__ = ["Make", "Sample", "make"]
