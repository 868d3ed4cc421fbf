"""Quantisation of a model's graphs: recipes, schemes, ranges, arithmetic, Q/DQ."""
