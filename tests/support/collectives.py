"""The communication between devices in a compiled program."""

import math
import re
from collections import Counter

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def moved(program: str) -> Counter[str]:
    """Counts the elements in the results of each kind of collective, on one device.

    Args:
      program: the optimised HLO, from `jax.stages.Compiled.as_text`.
    """
    total: Counter[str] = Counter()
    for result, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", program):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            total[kind] += math.prod(int(n) for n in shape.split(",") if n)
    return total
