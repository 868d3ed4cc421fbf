"""Engines in TensorRT and TensorRT-RTX: builds, optimization profiles, caches, runs."""
