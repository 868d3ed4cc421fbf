"""Run a bundle: ``InternVL.load(path)``. No torch; a backend is imported with its first engine."""

from .images import Reading
from .model import InternVL, Mode, Ranking
from .timings import Timing
from .urls import UrlPolicy

__all__ = ["InternVL", "Mode", "Ranking", "Reading", "Timing", "UrlPolicy"]
