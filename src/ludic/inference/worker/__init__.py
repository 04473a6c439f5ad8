"""Runs in vLLM's engine process, beside the model."""
