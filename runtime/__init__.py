"""Run a bundle: ``InternVL.load(path)``, or ``InternVLChat.load(path)``.

No torch; a backend is imported with its first engine.
"""

from ..inputs.video import frames_of
from .admission import Answer, ServiceLimits
from .chat import Chat, InternVLChat
from .chat_service import ChatService
from .image_batches import Reading
from .index import Index
from .matching import Ranking
from .model import InternVL, Mode
from .service import Service
from .timings import Timing
from .urls import UrlPolicy

__all__ = [
    "Answer",
    "Chat",
    "ChatService",
    "Index",
    "InternVL",
    "InternVLChat",
    "Mode",
    "Ranking",
    "Reading",
    "Service",
    "ServiceLimits",
    "Timing",
    "UrlPolicy",
    "frames_of",
]
