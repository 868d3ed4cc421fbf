"""The build conveyor: content-hashed steps from a checkpoint to a sealed bundle."""
