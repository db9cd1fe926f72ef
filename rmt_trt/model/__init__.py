"""Models: the segment step in PyTorch, its reference recurrence, and the checkpoints it is read from."""
