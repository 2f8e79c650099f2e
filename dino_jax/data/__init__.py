"""Pictures on their way to the device: sources, decoding, batches, and the crops made there."""
