"""From scored groups to new weights: the loop, the learner, packing, attention, losses, checkpoints."""
