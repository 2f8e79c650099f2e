"""File formats: from bytes to named tensors."""
