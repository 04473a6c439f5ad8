"""A task and its model: the environment, prompts, parsers, grading, data files, and loading a model."""
