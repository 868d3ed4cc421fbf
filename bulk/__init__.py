"""Many inputs at once: a plan of shards, each embedded and written whole, resumed and verified."""
