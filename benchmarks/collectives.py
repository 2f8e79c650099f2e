"""What the devices of a compiled program tell each other, read from its text."""

import math
import re
from collections import Counter

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_BITS = re.compile(r"\d+$")  # of a dtype's name; `pred` has none


def moved_bytes(program: str) -> Counter[str]:
    """Bytes that come out of each kind of collective of a program on one device.

    Args:
      program: optimised HLO, as `jax.stages.Compiled.as_text` gives it.
    """
    total: Counter[str] = Counter()
    for result, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", program):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            bits = _BITS.search(dtype)
            size = max(int(bits[0]), 8) // 8 if bits else 1
            total[kind] += size * math.prod(int(n) for n in dims.split(",") if n)
    return total
