"""The small models and sets of the calibration tests, which these share."""

from ivl_export.tests.calibration.conftest import checkpoint, photos, scenes, settings, shallow, tokenizer

__all__ = ["checkpoint", "photos", "scenes", "settings", "shallow", "tokenizer"]
