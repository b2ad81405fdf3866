"""One model trained under Ray Train: the loop, its learner, its checkpoints, its curves."""
