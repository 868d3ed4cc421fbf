"""Many requests at once on one model: admission, batching, decoding step by step, for asyncio."""
