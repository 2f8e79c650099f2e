"""How well will training scale to many GPUs, on paper? Prints one JSON line.

python benchmarks/scaling.py --config=configs/vit_small.py --batch-size=64 --step-ms=22.9
python benchmarks/scaling.py --config=configs/vit_base.py --batch-size=64

  parameter_mb      P, the student's parameters in float32
  collectives_mb    what the collectives of a step return on each device: by `formula`, and
                    `compiled`, counted in the step as XLA compiles it for eight virtual CPU devices
  step_ms           one GPU's step with --batch-size images. Without --step-ms, an assumption: the
                    project's goal for that model (see `step_ms_from`)
  communication_ms  of dp and fsdp, by number of GPUs
  efficiency        images/s per GPU relative to a single GPU, by number of GPUs: with no overlap of
                    computation and communication (`none`), and with complete overlap (`full`)

dp sums the gradients: one all-reduce of P. fsdp gathers the weights of student and teacher (two
all-gathers of P) and scatters the summed gradients (a reduce-scatter of P). An all-reduce is a
reduce-scatter and an all-gather. Each of these takes, for n GPUs in m = n/g nodes of g GPUs,

    P (g - 1)/g / link  +  P/g (m - 1)/m / network

seconds, where `link` and `network` are the bytes/s of a GPU in one direction: every GPU exchanges
data within its node, and its share of the result with its peers in the other nodes. Latency,
stragglers and links below their nominal speed are ignored.
"""

import dataclasses
import math
import os
import re
from collections import Counter

os.environ["JAX_PLATFORMS"] = "cpu"  # the step exchanges the same on any platform
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from config_flag import describe, load, parser
from machine import report
from ml_collections import ConfigDict
from our_step import lay_out

from dino_jax import sharding
from dino_jax.training.step import compile_step

ASSUMED_IMAGES_PER_S = {"vit_small": 2800, "vit_base": 1000}  # goals for one H200, not measurements
ONE_WAYS = {"dp": 2, "fsdp": 3}  # reduce-scatters and all-gathers of P per step
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def moved_bytes(program: str) -> Counter[str]:
    """Bytes that each kind of collective returns on one device.

    Args:
      program: optimised HLO, as `jax.stages.Compiled.as_text` returns it.
    """
    total: Counter[str] = Counter()
    for results, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", program):
        for bits, dims in re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", results):
            size = max(int(bits or 8), 8) // 8  # `pred` has no number
            total[kind] += size * math.prod(int(n) for n in dims.split(",") if n)
    return total


def compiled_bytes(config: ConfigDict, mode: str) -> dict[str, int]:
    """Bytes that each kind of collective of the compiled step returns. Allocates no arrays."""
    config.train.sharding = mode
    mesh = sharding.make_mesh()
    plan = lay_out(config, mesh)
    size, side = config.train.batch_size, config.data.canvas_size
    batch = {
        "canvas": jax.ShapeDtypeStruct((size, side, side, len(config.crops.mean)), jnp.uint8),
        "size": jax.ShapeDtypeStruct((size, 2), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    spread = jax.tree.map(lambda _: sharding.batch_sharded(mesh), batch)
    batch = sharding.with_shardings(batch, spread)
    state = sharding.with_shardings(plan.shapes, plan.shardings)
    return dict(moved_bytes(compile_step(plan.step, state, batch, plan.shardings).as_text()))


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal nodes of GPUs. Speeds are bytes/s per GPU in one direction."""

    node: int = 8  # GPUs
    link: float = 450e9  # within a node: NVLink 4
    network: float = 50e9  # between nodes: InfiniBand NDR, one port per GPU

    def one_way_seconds(self, num_bytes: float, gpus: int) -> float:
        """Seconds of an all-gather or reduce-scatter over whole nodes of GPUs.

        Args:
          num_bytes: size of the gathered, or of the reduced, array.
          gpus: number of GPUs.
        """
        nodes = gpus / self.node
        within = num_bytes * (self.node - 1) / self.node / self.link
        return within + num_bytes / self.node * (nodes - 1) / nodes / self.network


def expected_bytes(parameters: int) -> dict[str, dict[str, int]]:
    """What the collectives return on each device, for a number of bytes of parameters."""
    return {
        "dp": {"all-reduce": parameters},
        "fsdp": {
            "all-gather": 2 * parameters,
            "reduce-scatter": parameters // jax.device_count(),
        },
    }


def efficiency(step: float, communication: float) -> dict[str, float]:
    """Efficiency without overlap of step and communication, and with complete overlap."""
    return {
        "none": round(step / (step + communication), 4),
        "full": round(step / max(step, communication), 4),
    }


def megabytes(sizes: dict[str, int]) -> dict[str, float]:
    return {kind: round(size / 1e6, 4) for kind, size in sorted(sizes.items())}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--step-ms", type=float, help="measured on one GPU")
    flags.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    for field in dataclasses.fields(Cluster):
        flags.add_argument(f"--{field.name}", type=field.type, default=field.default)
    flags.add_argument("--no-compile", action="store_true", help="only the formula")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    cluster = Cluster(flags.node, flags.link, flags.network)
    if cluster.node < 1:
        raise SystemExit(f"--node={cluster.node}: a node has at least 1 GPU")
    if refused := [n for n in flags.gpus if n < cluster.node or n % cluster.node]:
        raise SystemExit(f"--gpus {refused}: choose multiples of --node={cluster.node}")
    step_ms, source = flags.step_ms, "given"
    if step_ms is None:
        if config.model.name not in ASSUMED_IMAGES_PER_S:
            raise SystemExit(f"there is no goal for {config.model.name}: give --step-ms")
        step_ms = 1e3 * flags.batch_size / ASSUMED_IMAGES_PER_S[config.model.name]
        source = "assumption: the goal"

    shapes = lay_out(config, sharding.make_mesh()).shapes
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.params))
    collectives = {"formula": expected_bytes(parameters)}
    if not flags.no_compile:
        config.train.batch_size = jax.device_count()  # collectives do not depend on it
        collectives["compiled"] = {mode: compiled_bytes(config, mode) for mode in ONE_WAYS}
        config.train.batch_size = flags.batch_size
    communication = {
        mode: {n: count * cluster.one_way_seconds(parameters, n) for n in flags.gpus}
        for mode, count in ONE_WAYS.items()
    }
    result = {
        "step_ms": round(step_ms, 2),
        "step_ms_from": source,
        "parameter_mb": round(parameters / 1e6, 4),
        "collectives_mb": {
            side: {mode: megabytes(sizes) for mode, sizes in modes.items()}
            for side, modes in collectives.items()
        },
        "communication_ms": {
            mode: {n: round(1e3 * s, 3) for n, s in by_gpus.items()}
            for mode, by_gpus in communication.items()
        },
        "efficiency": {
            mode: {n: efficiency(step_ms, 1e3 * s) for n, s in by_gpus.items()}
            for mode, by_gpus in communication.items()
        },
    }
    about = {"cluster": dataclasses.asdict(cluster)}
    report("scaling", result | describe(flags, config) | about)


if __name__ == "__main__":
    main()
