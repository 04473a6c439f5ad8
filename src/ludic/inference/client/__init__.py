"""Runs in the trainer's process: starting a server, talking to it, generating."""
