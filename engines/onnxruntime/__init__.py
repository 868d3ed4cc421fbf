"""Engines in ONNX Runtime: sessions, providers, shared weights."""
