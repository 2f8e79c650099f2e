"""Converts full checkpoints of the reference to training states."""
