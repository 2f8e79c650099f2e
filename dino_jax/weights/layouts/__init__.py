"""Tensor names and shapes of other implementations, mapped to ours."""
