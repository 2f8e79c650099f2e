"""Scores of frozen features: each protocol is a module of pure functions on arrays."""
