"""Ways to compute our training step, beside the way the package does; prints one JSON line.

python benchmarks/variants.py --variant remat-dots scan
python benchmarks/variants.py --config=configs/vit_small.py --batch-size=8

The variants are in `peers/variants.py`; unnamed, all are tried. Each lives in a process of its own.
Before any timing, the teacher's logits, the loss and all its gradients must agree in float32 at
full matmul precision, and then the losses of the first three steps. Where the timed arithmetic is
another, logits, loss and gradients in that may be no further from those in float32 than twice the
package's own. A variant that differs, or that the machine cannot compile, is refused and not timed.

  step_ms, ratio    median of the rounds; a ratio above 1 says that the variant is faster
  mb_per_image      memory for temporaries, as the compiler planned it, by image of the batch
  apart             from float32 in the timed arithmetic, as a share of an array's largest value
  refused           why a variant has no figures
"""

import json
import sys
from statistics import median
from typing import Any

import numpy as np
from config_flag import describe, load, parser
from ml_collections import ConfigDict
from peer_torch import check, make_comparable, open_ours
from peers.task import Side, Task
from peers.worker import Worker, share_gpu

TOLERANCE = 1e-4  # on logits, loss and gradients, of the largest value of an array
ROUGH = 2  # times as far from float32 as the package is, in the timed arithmetic


def open_variant(config: ConfigDict, name: str) -> Side:
    from peers.ours import OurSide
    from peers.variants import VARIANTS

    VARIANTS[name](config)
    return OurSide(config)


def difference(ours: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The largest difference, as a share of the largest value of its array."""
    return max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(ours, others, strict=True)
    )


def distance(side: Worker, task: Task, expected: list[np.ndarray], *, exact: bool) -> float:
    """Of a side's logits, loss and gradients from those in float32: exact ones, or as timed."""
    return difference(expected, side.call("derivatives", task, exact=exact))


def objection(exact: float, rough: float, package: float) -> str | None:
    """What speaks against a variant with these distances, the package's as timed."""
    if not exact <= TOLERANCE:  # nor a NaN
        return f"logits, loss or gradients are {exact:.1e} apart"
    if not rough <= max(TOLERANCE, ROUGH * package):
        return f"in the timed arithmetic {rough:.1e} from float32, the package {package:.1e}"
    return None


def compare(config: ConfigDict, names: list[str], *, rounds: int, steps: int) -> dict[str, Any]:
    ours = Worker(open_ours, config)
    task = ours.call("task")
    expected = ours.call("derivatives", task, exact=True)
    package = 0.0 if task.exact else distance(ours, task, expected, exact=False)
    sides, apart, refused = {"ours": ours}, {"ours": package}, {}
    for name in names:
        print("checking", name, file=sys.stderr, flush=True)
        try:
            side = Worker(open_variant, config, name)
            exact = apart[name] = distance(side, task, expected, exact=True)
            if not task.exact:
                apart[name] = distance(side, task, expected, exact=False)
        except Exception as error:  # the others may still be compared
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if why := objection(exact, apart[name], package):
            refused[name] = why
        else:
            sides[name] = side
    refused |= check(sides, task)[1]
    timed = {name: side for name, side in sides.items() if name not in refused}
    for side in timed.values():
        side.call("seconds", 2)  # warm-up
    times = [
        {name: side.call("seconds", steps) for name, side in timed.items()} for _ in range(rounds)
    ]
    return {
        "step_ms": {name: round(1e3 * median(r[name] for r in times), 2) for name in timed},
        "ratio": {name: round(median(r["ours"] / r[name] for r in times), 3) for name in timed},
        "mb_per_image": {
            name: round(side.call("temporary_bytes") / task.batch_size / 1e6, 1)
            for name, side in timed.items()
        },
        "apart": {name: float(f"{each:.2g}") for name, each in apart.items()},
        "refused": refused,
        "about": sides["ours"].call("about"),
    }


def main() -> None:
    from peers.variants import VARIANTS

    flags = parser(__doc__)
    flags.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    flags.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    flags.add_argument("--steps", type=int, default=4, help="in a turn")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    make_comparable(config)
    share_gpu(1 + len(flags.variant))
    result = compare(config, flags.variant, rounds=flags.rounds, steps=flags.steps)
    about = {"rounds": flags.rounds, "steps": flags.steps}
    print(json.dumps({"benchmark": "variants"} | result | describe(flags, config) | about))


if __name__ == "__main__":
    sys.exit(main())
