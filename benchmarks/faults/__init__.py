"""Faults on purpose: each module pulls one kind of plug many times and says what came of each."""
