"""Runs in the process of vLLM's HTTP front end."""
