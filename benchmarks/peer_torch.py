"""How fast is the training step, compared with the same step in PyTorch? Prints one JSON line.

python benchmarks/peer_torch.py                                    # small, for a laptop's CPU
python benchmarks/peer_torch.py --config=configs/vit_small.py \
    --variant eager modern timm

The variants are described in `peers/torch_step.py`. Each side runs in its own process. The sides
take turns, so that a change of the machine's load affects all of them. Crops are left out: all
sides get the same views, and the same weights. Ours does everything else that it does in training.

Before the timing each side makes three steps in float32 at full matmul precision. Their losses must
agree within 1e-4, else there is no ratio and the exit code is 1. If the timed steps use another
arithmetic (bfloat16, TF32), its first loss must agree too, within 2e-2.

  step_ms, ratio    median of the rounds; with a ratio above 1 ours is faster
  ratio_range       minimum and maximum of the rounds
  losses            of the exact steps, by side
  peak_memory_gib   of each side on a GPU, null elsewhere
  refused           why a variant could not be compared
"""

import argparse
import os
import sys
from statistics import median
from typing import Any

import numpy as np
from config_flag import describe, load, parser
from machine import report
from ml_collections import ConfigDict
from peers.task import Side, Task
from peers.worker import Worker, share_gpu

VARIANTS = ("eager", "modern", "timm")
EXACT, ROUGH = 1e-4, 2e-2  # relative, on losses: float32, and bfloat16 or TF32


def open_ours(config: ConfigDict) -> Side:
    from peers.ours import OurSide  # here and below: in the worker process of that side

    return OurSide(config)


def open_torch(task: Task, variant: str, compiled: bool | None) -> Side:
    from peers.torch_step import TorchSide

    return TorchSide(task, variant, compiled)


def check(sides: dict[str, Worker], task: Task) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Losses of the exact steps, and why variants cannot be compared. Leaves all ready to time."""
    losses: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    stages = [(True, EXACT)] if task.exact else [(True, EXACT), (False, ROUGH)]
    for exact, tolerance in stages:
        # One at a time: compilers that time kernels on the device would disturb each other.
        found = {"ours": sides["ours"].call("losses", task, exact=exact)}
        for variant in [name for name in sides if name != "ours" and name not in refused]:
            try:
                found[variant] = sides[variant].call("losses", task, exact=exact)
            except Exception as error:  # the others can still be compared
                refused[variant] = f"{type(error).__name__}: {error}"
                continue
            # A float16 scaler may skip the first steps, after which the losses differ.
            compared = slice(None if exact else 1)
            pair = found[variant][compared], found["ours"][compared]
            if not np.allclose(*pair, rtol=tolerance, atol=0):
                refused[variant] = f"losses {found[variant]} differ from ours, {found['ours']}"
        losses = losses or found
    return losses, refused


def compare(
    config: ConfigDict, variants: list[str], *, compiled: bool | None, rounds: int, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compares, then times. Returns the figures in the module's docstring, and our device."""
    sides = {"ours": Worker(open_ours, config)}
    task = sides["ours"].call("task")
    sides |= {name: Worker(open_torch, task, name, compiled) for name in variants}
    losses, refused = check(sides, task)
    timed = {name: side for name, side in sides.items() if name not in refused}
    for side in timed.values():
        side.call("seconds", 2)  # warm-up
    times = [
        {name: side.call("seconds", steps) for name, side in timed.items()} for _ in range(rounds)
    ]
    ratios = {name: [r[name] / r["ours"] for r in times] for name in timed if name != "ours"}
    result = {
        "step_ms": {name: round(1e3 * median(r[name] for r in times), 2) for name in timed},
        "ratio": {name: round(median(r), 3) for name, r in ratios.items()},
        "ratio_range": {name: [round(min(r), 3), round(max(r), 3)] for name, r in ratios.items()},
        "peak_memory_gib": {name: side.call("peak_gib") for name, side in timed.items()},
        "losses": losses,
        "refused": refused,
        "sides": {name: side.call("about") for name, side in sides.items()},
    }
    return result, sides["ours"].call("device")


def make_comparable(config: ConfigDict) -> None:
    """Removes randomness and learning rates of 0, so that all sides give the same losses."""
    config.model.drop_path_rate = 0.0
    config.optim.update(name="adamw", warmup_epochs=0, freeze_last_layer=0, accumulation_steps=1)
    config.head.use_bn = False
    config.log.every_steps = 1


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--variant", nargs="+", choices=VARIANTS, default=["eager"])
    flags.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile in variants other than eager; default: on a GPU only",
    )
    flags.add_argument("--threads", type=int, help="CPU cores for each side; default: all")
    flags.add_argument("--rounds", type=int, default=5, help="turns of each side")
    flags.add_argument("--steps", type=int, default=4, help="per turn")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    make_comparable(config)
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    os.sched_setaffinity(0, cores)  # inherited by the worker processes, like the variables below
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    share_gpu(1 + len(flags.variant))
    result, device = compare(
        config,
        flags.variant,
        compiled=flags.compile,
        rounds=flags.rounds,
        steps=flags.steps,
    )
    about = {"threads": len(cores), "rounds": flags.rounds, "steps": flags.steps}
    report("peer_torch", result | describe(flags, config) | about, computed_on=device)
    return 1 if result["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
