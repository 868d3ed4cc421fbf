"""The artifact of a build: component contracts, manifest, the folder, and replacing one by another."""

from .bundle import Bundle, Verify, seal

__all__ = ["Bundle", "Verify", "seal"]
