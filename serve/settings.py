"""Settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..inputs.images import MAX_PIXELS
from ..runtime.serving.admission import ServiceLimits
from ..runtime.urls import UrlPolicy


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Args:
        host, port: where it listens.
        keys: API keys, one of which a request must bear; empty: none is needed.
        urls: which addresses of images are fetched; None: none.
        max_body: bytes of a request.
        max_held: bytes of all requests whose bodies are held.
        max_pixels: of an image, read from its header.
        timeout: seconds for a request, from its first byte to its answer's last.
        drain_delay: seconds for which requests are still taken after SIGTERM.
        limits: of each model: items (images, texts, conversations) that run and wait.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    urls: UrlPolicy | None = None
    max_body: int = 32 << 20
    max_held: int = 512 << 20
    max_pixels: int = MAX_PIXELS
    timeout: float = 60.0
    drain_delay: float = 5.0
    limits: ServiceLimits = field(default_factory=lambda: ServiceLimits(max_queued=1024))
