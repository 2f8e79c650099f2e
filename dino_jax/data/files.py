"""Image files by their paths, in a given order and without classes, as a source."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dino_jax.data.decode import open_image


class Files:
    """The files of a list; `spec` is what messages call it."""

    class_names = None

    def __init__(self, spec: str, paths: Sequence[Path]) -> None:
        self.spec = spec
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return open_image(self._paths[index])

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return str(self._paths[index])
