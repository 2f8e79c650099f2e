"""The input pipeline: image sources, decoding, batches, and the crops made on the device."""
