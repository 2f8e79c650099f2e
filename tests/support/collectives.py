"""What the devices of a compiled program exchange."""

import math
import re
from collections import Counter

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    r"|collective-broadcast)(?:-start)?\("
)
WORDS = ("f32", "s32", "u32")  # of 4 bytes; a step exchanges no other dtypes


def moved_words(program: str) -> Counter[str]:
    """Words of 4 bytes that each kind of collective returns on one device.

    Args:
      program: optimised HLO, as `jax.stages.Compiled.as_text` returns it.
    """
    total: Counter[str] = Counter()
    for results, kind in COLLECTIVE.findall(program):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", results):
            assert dtype in WORDS, f"{kind} of {dtype}"
            total[kind] += math.prod(int(n) for n in dims.split(",") if n)
    return total
