"""Costs computed, not measured: FLOPs, bytes, roofline, estimates."""
