"""Run a bundle: ``load(path)`` gives an ``InternVL`` or an ``InternVLChat``.

No torch; a backend is imported with its first engine.
"""

from ..inputs.video import frames_of
from .chat import Chat, InternVLChat
from .image_batches import Reading
from .index import Index
from .load import load
from .matching import Ranking
from .model import InternVL, Mode
from .serving.admission import Response, ServiceLimits
from .serving.chat_service import ChatService
from .serving.service import Service
from .timings import Timing
from .urls import UrlPolicy

__all__ = [
    "Chat",
    "ChatService",
    "Index",
    "InternVL",
    "InternVLChat",
    "Mode",
    "Ranking",
    "Reading",
    "Response",
    "Service",
    "ServiceLimits",
    "Timing",
    "UrlPolicy",
    "frames_of",
    "load",
]
