"""Many texts in one block of bytes: a list of a million would take four times the memory."""

import dataclasses
from collections.abc import Sequence
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
    def of(cls, texts: Sequence[bytes]) -> Self:
        """Joins texts."""
        return cls(b"".join(texts), np.cumsum([len(text) for text in texts], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.block[self.ends[index - 1] if index else 0 : self.ends[index]]
