"""Training and sampling on several ranks: their sums, signals, and sharded optimizer state."""
