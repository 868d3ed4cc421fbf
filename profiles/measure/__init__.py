"""Latency measured on this machine, and what it is compared with."""
