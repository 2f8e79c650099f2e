"""What surrounds the training step in a run."""
