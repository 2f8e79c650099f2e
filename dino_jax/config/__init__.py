"""Config files: reading, validation and conversion to plain values."""
