"""What really runs in 8 bits: one reader for each library, and the report they make."""
