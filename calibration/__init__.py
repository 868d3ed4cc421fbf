"""Calibration sets, precision recipes, activation ranges, Q/DQ graphs, 8-bit weights, accuracy."""
