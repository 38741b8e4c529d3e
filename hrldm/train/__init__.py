"""One generator per training stage, and the checkpoints they resume from."""
