"""`SOURCE[a:b]`: the records a to b of any source."""

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from dino_jax.data.sources import Source


class Subset:
    """The records of a source in a range, under new indices from 0."""

    def __init__(self, source: "Source", records: range) -> None:
        self.class_names = source.class_names
        self._source = source
        self._records = records

    @property
    def spec(self) -> str:
        return f"{self._source.spec}[{self._records.start}:{self._records.stop}]"

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image.Image:
        return self._source.image(self._records[index])

    def label(self, index: int) -> int:
        return self._source.label(self._records[index])

    def name(self, index: int) -> str:
        return self._source.name(self._records[index])
