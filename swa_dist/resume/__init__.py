"""What outlives an interruption, and where a run starts."""
