"""Latency measured on this machine, and its baselines."""
