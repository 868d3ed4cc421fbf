"""Published benchmarks on a user's own copy of the data, through a bundle's engines. No torch."""
