"""Image sources: folders, packed records, TFDS datasets, idx files and generated shapes."""

from dino_jax.data.sources.opening import open_source
from dino_jax.data.sources.source import EncodedSource, Source

__all__ = ["EncodedSource", "Source", "open_source"]
