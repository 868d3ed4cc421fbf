"""Verification: reads back which products an engine really runs in 8 bits. One reader a library, one
report."""
