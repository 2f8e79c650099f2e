"""From a config file to checked, plain values."""
