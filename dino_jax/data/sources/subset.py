"""Some of the images of a source, such as `SOURCE[a:b]`."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dino_jax.data.sources.source import Source


class Subset:
    """Some images of a source, renumbered from 0."""

    def __init__(self, source: Source, records: Sequence[int], name: str) -> None:
        """Reads nothing yet.

        Args:
          source: the source to choose from.
          records: indices into it.
          name: describes the choice; the spec becomes `SOURCE[name]`.
        """
        self.class_names = source.class_names
        self.spec = f"{source.spec}[{name}]"
        self._source = source
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def labels(self) -> np.ndarray | None:
        labels = self._source.labels
        return None if labels is None else labels[np.asarray(self._records)]

    @property
    def folders(self) -> tuple[Source, ...]:
        """The folders that were searched for images."""
        return getattr(self._source, "folders", ())

    def image(self, index: int) -> Image.Image:
        return self._source.image(self._records[index])

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(self._records[index])

    def label(self, index: int) -> int:
        return self._source.label(self._records[index])

    def name(self, index: int) -> str:
        return self._source.name(self._records[index])

    def stamp(self, index: int) -> str:
        return self._source.stamp(self._records[index])
