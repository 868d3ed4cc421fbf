"""Components with their specs, tracing without weights, the weights store."""
