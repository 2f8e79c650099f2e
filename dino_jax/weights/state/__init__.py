"""Training states from checkpoints of the reference."""
