"""Run a bundle: ``InternVL.load(path)``. No torch; a backend is imported with its first engine."""

from .images import Reading
from .model import InternVL, Mode, Ranking
from .service import Answer, Service, ServiceLimits
from .timings import Timing
from .urls import UrlPolicy

__all__ = [
    "Answer",
    "InternVL",
    "Mode",
    "Ranking",
    "Reading",
    "Service",
    "ServiceLimits",
    "Timing",
    "UrlPolicy",
]
