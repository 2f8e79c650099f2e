"""Many strings in one block of bytes, which takes a quarter of the memory of a list of them."""

import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Names:
    """Byte strings by index.

    Attributes:
      block: all strings, concatenated.
      ends: [len] int64, the end of each string in the block.
    """

    block: bytes
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> Self:
        """Packs the strings of an iterable, which may be a generator to save memory."""
        block, ends = bytearray(), array("q")
        for text in texts:
            block += text
            ends.append(len(block))
        return cls(bytes(block), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.block[self.ends[index - 1] if index else 0 : self.ends[index]]

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))
