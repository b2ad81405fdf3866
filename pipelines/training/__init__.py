"""Training of one model under Ray Train: the loop, the training step, checkpoints, curves."""
