"""From flags to a run: what the training script of any task shares. `training.train_from_flags` is the whole of it.

The script brings a `training.Task`: an environment, and a function that loads its samples. `examples/sums.py` is a complete
one. Nothing is imported here: an evaluation needs `engine` alone.
"""
