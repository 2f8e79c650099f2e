"""What every source of images offers."""

from typing import Protocol

import numpy as np
from PIL import Image


class Source(Protocol):
    """Pictures by index, with a class each or none; reading is safe from many threads.

    Attributes:
      spec: the text that opens this source.
      class_names: by class, or None where the source has no names.
      labels: [len] int32 classes; None where there are none, or only the records tell them.
    """

    spec: str
    class_names: tuple[str, ...] | None
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Opens picture `index`; raises `UnreadableImage` where the file is none."""
        ...

    def label(self, index: int) -> int:
        """The class of picture `index`, or -1."""
        ...

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""
        ...

    def stamp(self, index: int) -> str:
        """What differs for another picture, and for picture `index` once it is replaced."""
        ...


class EncodedSource(Source, Protocol):
    """A source that can give its pictures as files; `open_source` opens no other."""

    def encoded(self, index: int) -> bytes:
        """The file of picture `index`, whatever it holds; a PNG where there are bare pixels.

        Raises `UnreadableImage` where there is no such file.
        """
        ...
