"""The interface of an image source."""

from typing import Protocol

import numpy as np
from PIL import Image


class Source(Protocol):
    """Images by index, with or without classes; many threads may read at once.

    Attributes:
      spec: the text that opens this source.
      class_names: the name of each class, or None.
      labels: [len] int32 classes; None if there are none, or if they are stored with the images.
    """

    spec: str
    class_names: tuple[str, ...] | None
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Opens image `index`; raises `UnreadableImage` if its file is missing or not an image."""
        ...

    def label(self, index: int) -> int:
        """The class of image `index`, or -1."""
        ...

    def name(self, index: int) -> str:
        """The name of image `index` in messages."""
        ...

    def stamp(self, index: int) -> str:
        """Identifies image `index`, and changes when the image is replaced."""
        ...


class EncodedSource(Source, Protocol):
    """A source that can return its images as encoded files, as every opened source can."""

    def encoded(self, index: int) -> bytes:
        """The content of image `index`'s file, unchecked; a PNG if the source has only pixels.

        Raises `UnreadableImage` if the file cannot be read.
        """
        ...
