"""Training: initial weights, the one training loop, processes that train together, checkpoints."""
