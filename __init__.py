"""ivl-export: InternVL checkpoints to verified FP8 / INT8 engines."""

__version__ = "0.1.0"
