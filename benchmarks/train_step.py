"""How fast is a training step, and where does its time go? Prints one JSON line.

python benchmarks/train_step.py                                    # small, for a laptop's CPU
python benchmarks/train_step.py --config=configs/vit_small.py --batch-size=64      # one GPU's share
python benchmarks/train_step.py --config=configs/vit_small.py --batch-size=256 \
    --data=folder:/imagenet/train --config.model.remat=dots

  images_per_s, step_ms    canvases are on the device already; median over groups of steps
  gflop_per_image          `formula`: counted from the matrix products, without crops; `compiled`:
                           XLA's analysis of the compiled step, minus that of the crops
  utilisation              rate of the formula's FLOPs divided by `peak_tflops`, the best rate of a
                           large matrix product in the compute dtype in the same process
  peak_memory_gib          of a device, from its own statistics, else as the compiler planned
  crops_ms, crops_share    making the crops alone, and its share of the step's time
  python_overhead_ms       host time to call a compiled function with the step's arguments, results
                           and donation but no work: the cost of the host on any device
  dispatch_ms              host time to call the step while the device is idle. On a GPU this adds
                           kernel launches; on a CPU it may include part of the computation
  attention                the kernel that computes the attention of a ViT
  out_of_memory            instead of all figures: the device's error if the step does not fit
  data                     with --data: the same step fed by the real pipeline. The next batch is
                           requested only after a step has finished, so waiting for it is time in
                           which the device is idle
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from config_flag import describe, load, parser
from flops import flops_per_image
from machine import report
from ml_collections import ConfigDict
from our_step import OurStep, arithmetic, compiled_step, peak_bytes, seconds_per_call

from dino_jax import sharding
from dino_jax.config import checks
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.prefetch import DevicePrefetch
from dino_jax.data.sources import open_source
from dino_jax.memory import is_out_of_memory
from dino_jax.training.step import Batch

GROUPS = 5  # of timed steps; the median is of these
READ_AHEAD = 4  # batches that threads and prefetch may have ready in advance


def random_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> Batch:
    """A batch of noise that fills its canvases, on the devices."""
    size, side = config.train.batch_size, config.data.canvas_size
    shape = (size, side, side, len(config.crops.mean))
    batch = {
        "canvas": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "size": np.full((size, 2), side, np.int32),
        "index": np.arange(size, dtype=np.int32),
        "label": np.full(size, -1, np.int32),
    }
    return jax.device_put(batch, sharding.batch_sharded(mesh))


def matmul_flops_per_s(dtype: jnp.dtype) -> float:
    """The best rate of a large square product of random matrices on one device."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), dtype) for key in keys)
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    work = lambda: product(a, b)  # noqa: E731
    seconds_per_call(work, groups=1, size=2)
    return 2 * side**3 / min(seconds_per_call(work, groups=8, size=2))


def python_overhead(ours: OurStep, batch: Batch) -> float:
    """Median seconds of a call with the step's arguments, results and donation but no work."""
    # JAX would forward bare arguments; XLA removes the product with one.
    call = jax.jit(
        lambda state, batch: jax.tree.map(lambda x: x * 1, state),
        donate_argnums=0,
        out_shardings=ours.plan.shardings,
        keep_unused=True,
    )
    call = call.lower(ours.state, batch).compile()
    seconds = []
    for _ in range(100):
        jax.block_until_ready(ours.state)
        start = time.perf_counter()
        ours.state = call(ours.state, batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def dispatch_seconds(ours: OurStep, batch: Batch) -> float:
    """Median seconds until a call of the step returns, with an idle device."""
    seconds = []
    for _ in range(GROUPS):
        jax.block_until_ready(ours.state)
        start = time.perf_counter()
        ours(batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def with_data(
    ours: OurStep, config: ConfigDict, mesh: jax.sharding.Mesh, spec: str, steps: int
) -> dict[str, Any]:
    """The rate of the step with the real pipeline, and the share of time it waits for data."""
    records = Records(open_source(spec), channels=len(config.crops.mean))
    numpy_batches = train_batches(
        records,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=0,
        canvas_size=config.data.canvas_size,
        num_threads=config.data.num_threads,
    )
    with DevicePrefetch(numpy_batches, sharding.batch_sharded(mesh)) as batches:
        for _ in range(READ_AHEAD):  # uses up what was read in advance
            jax.block_until_ready(ours(next(batches)))
        start, waited = time.perf_counter(), batches.wait_seconds
        for _ in range(steps):
            jax.block_until_ready(ours(next(batches)))
        seconds, waited = time.perf_counter() - start, batches.wait_seconds - waited
    return {
        "source": spec,
        "num_threads": config.data.num_threads,
        "images_per_s": round(steps * config.train.batch_size / seconds, 1),
        "wait_share": round(waited / seconds, 4),
    }


def measure(config: ConfigDict, *, steps: int, data: str | None) -> dict[str, Any]:
    """All figures in the module's docstring."""
    mesh = sharding.make_mesh()
    checks.check(config, mesh.size)
    size = config.train.batch_size
    batch = random_batch(config, mesh)
    ours = compiled_step(config, batch, mesh)
    step = lambda: ours(batch)  # noqa: E731
    timing = {"groups": GROUPS, "size": -(-steps // GROUPS)}
    seconds_per_call(step, groups=1, size=2)  # warm-up
    step_seconds = seconds_per_call(step, **timing)
    seconds = statistics.median(step_seconds)
    memory, memory_source = peak_bytes(ours.compiled, mesh.devices.flat[0])
    dispatch = dispatch_seconds(ours, batch)

    crops = jax.jit(ours.plan.step.make_views).lower(batch, jnp.zeros((), jnp.int32)).compile()
    make_crops = lambda: crops(batch, jnp.zeros((), jnp.int32))  # noqa: E731
    seconds_per_call(make_crops, groups=1, size=2)
    crops_seconds = statistics.median(seconds_per_call(make_crops, **timing))

    pipeline = with_data(ours, config, mesh, data, steps) if data else None
    if skipped := int(ours.state.skipped_steps):
        raise SystemExit(f"{skipped} steps were not finite, so their times mean nothing")
    overhead = python_overhead(ours, batch)

    peak = matmul_flops_per_s(jnp.dtype(arithmetic(config)["dtype"])) * mesh.size
    formula = flops_per_image(config)
    counted = [ours.compiled.cost_analysis(), crops.cost_analysis()]
    step_flops, crops_flops = ((c or {}).get("flops", 0.0) * mesh.size / size for c in counted)
    return {
        "images_per_s": round(size / seconds, 1),
        "step_ms": round(1e3 * seconds, 2),
        "step_ms_min": round(1e3 * min(step_seconds), 2),
        "step_ms_max": round(1e3 * max(step_seconds), 2),
        "gflop_per_image": {
            "formula": formula and round(formula / 1e9, 4),
            "compiled": round((step_flops - crops_flops) / 1e9, 4),
        },
        "utilisation": formula and round(formula * size / seconds / peak, 4),
        "utilisation_counts": "formula",
        "peak_tflops": round(peak / 1e12, 4),
        "peak_memory_gib": round(memory / 2**30, 3),
        "peak_memory_from": memory_source,
        "crops_ms": round(1e3 * crops_seconds, 2),
        "crops_share": round(crops_seconds / seconds, 4),
        "python_overhead_ms": round(1e3 * overhead, 3),
        "dispatch_ms": round(1e3 * dispatch, 3),
        "compile_s": round(ours.compile_seconds, 1),
        "data": pipeline,
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=20, help="timed for each figure")
    flags.add_argument("--data", help="also time the step with this data: KIND:LOCATION[@SPLIT]")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    try:
        result = measure(config, steps=flags.steps, data=flags.data)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result = {"out_of_memory": str(error).partition("\n")[0]}
    settings = {
        "canvas_size": config.data.canvas_size,
        "sharding": config.train.sharding,
        "steps": flags.steps,
    }
    report("train_step", result | describe(flags, config) | arithmetic(config) | settings)


if __name__ == "__main__":
    main()
