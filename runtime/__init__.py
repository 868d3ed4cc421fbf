"""Run a bundle: ``InternVL.load(path)``. No torch; a backend is imported with its first engine."""

from .model import InternVL, Mode, Ranking
from .timings import Timing

__all__ = ["InternVL", "Mode", "Ranking", "Timing"]
