"""Many texts in one block of bytes: a list of a million would take four times the memory."""

import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Names:
    """Texts by index, as bytes.

    Attributes:
      block: all of them, one behind the other.
      ends: [len] int64, where in the block each ends.
    """

    block: bytes
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> Self:
        """Joins texts, of which no two need to be in memory at once."""
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
