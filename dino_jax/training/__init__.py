"""The algorithm: step, losses, optimizers, schedules and state."""
