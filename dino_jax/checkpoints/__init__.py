"""Checkpoints of a run: written, restored, checked for damage, and locked."""
