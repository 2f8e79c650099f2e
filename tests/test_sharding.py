"""The same run on one device, on eight devices, and with its state sharded over eight."""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dino_jax import sharding
from dino_jax.data.transforms.multicrop import CropSettings
from dino_jax.models import DINOHead, VisionTransformer, create_model
from dino_jax.models.network import MultiCropModel
from dino_jax.training import optim, schedules
from dino_jax.training.state import TrainState, initializer
from dino_jax.training.step import StepSettings, compile_step
from dino_jax.training.views import make_views
from tests.support.collectives import moved

PyTree = Any
BATCH, STEPS, K = 16, 4, 256


def build(rngs: nnx.Rngs) -> MultiCropModel:
    backbone = VisionTransformer(
        patch_size=8,
        image_size=16,
        embed_dim=64,
        depth=2,
        num_heads=2,
        drop_path_rate=0.3,
        rngs=rngs,
    )
    head = DINOHead(64, K, hidden_dim=64, bottleneck_dim=32, num_layers=2, rngs=rngs)
    return MultiCropModel(backbone, head)


TX = optim.make_optimizer("adamw", clip_grad=3.0, norm_last_layer=True)
NETWORK, INIT = initializer(build, TX, num_prototypes=K)
SHAPES = jax.eval_shape(INIT, jax.random.key(0))


def image_batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "canvas": rng.integers(0, 256, (BATCH, 24, 24, 3), dtype=np.uint8),
        "size": rng.integers(12, 25, (BATCH, 2), dtype=np.int32),
        "index": np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int32),
    }


@dataclasses.dataclass
class Run:
    """The results of a few real steps on some devices."""

    start: TrainState  # on the host
    end: TrainState
    losses: list[float]
    donated: bool
    program: str  # the optimised HLO

    @classmethod
    def of(
        cls, devices: int, mode: str, start: TrainState | None = None, accumulation_steps: int = 1
    ) -> "Run":
        mesh = sharding.make_mesh(jax.devices()[:devices])
        shardings = sharding.state_shardings(SHAPES, mesh, mode)
        if start is None:
            made = jax.jit(INIT, out_shardings=shardings)(jax.random.key(0))
            start = jax.tree.map(np.array, made)
        state = jax.device_put(start, shardings)  # new buffers, which the step may donate
        settings = StepSettings(
            network=NETWORK,
            tx=TX,
            make_views=partial(
                make_views,
                seed=0,
                crops=CropSettings(global_size=16, local_size=8, local_number=2),
            ),
            lr=schedules.cosine(1e-3, 1e-6, total_steps=STEPS),
            weight_decay=schedules.cosine(0.04, 0.4, total_steps=STEPS),
            momentum=schedules.cosine(0.9, 1.0, total_steps=STEPS),
            teacher_temp=schedules.teacher_temperature(
                0.04, 0.07, warmup_epochs=2, steps_per_epoch=2
            ),
            steps_per_epoch=2,
            freeze_steps=1,
            accumulation_steps=accumulation_steps,
            layout=sharding.pass_layout(shardings.params, mesh),
        )
        spread = partial(jax.device_put, device=sharding.batch_sharded(mesh))
        step = compile_step(settings, state, spread(image_batch(0)), shardings)
        losses, first = [], state
        for number in range(STEPS):
            state = step(state, spread(image_batch(number)))
            losses.append(float(state.meters.interval["loss"]))
        donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
        return cls(start, state, losses, donated, step.as_text())


@pytest.fixture(scope="module")
def fsdp() -> Run:
    return Run.of(8, "fsdp")


@pytest.fixture(scope="module")
def dp(fsdp: Run) -> Run:
    """A run compiled with all optimisations, as in production."""
    jax.config.update("jax_disable_most_optimizations", False)
    run = Run.of(8, "dp", fsdp.start)
    jax.config.update("jax_disable_most_optimizations", True)
    return run


@pytest.fixture(scope="module")
def single() -> Run:
    return Run.of(1, "dp")


# Rules


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((384, 1536), (None, "data")),  # the largest axis
        ((1536, 384), ("data",)),
        ((256, 65536), (None, "data")),
        ((1, 65536), (None, "data")),
        ((1, 197, 384), (None, None, "data")),  # the largest divisible by eight
        ((64, 64), ("data",)),  # 4,096 elements are large enough
        ((63, 64), ()),
        ((4095,), ()),
        ((1001, 1001), ()),  # no axis divisible by eight
        ((), ()),
    ],
)
def test_fsdp_shards_the_largest_divisible_axis_of_a_large_array(
    shape: tuple[int, ...], spec: tuple[str | None, ...]
) -> None:
    mesh, array = sharding.make_mesh(), jax.ShapeDtypeStruct(shape, jnp.float32)
    found = sharding.array_sharding(array, mesh, "fsdp")
    assert found.mesh == mesh
    assert found.spec == PartitionSpec(*spec)
    assert sharding.array_sharding(array, mesh, "dp").spec == PartitionSpec()


def stored_share(state: PyTree, shardings: PyTree) -> float:
    """The fraction of a state that each device stores."""
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
    stored = sum(math.prod(where.shard_shape(array.shape)) for array, where in pairs)
    return stored / sum(array.size for array, _ in pairs)


def test_fsdp_stores_an_eighth_of_the_state() -> None:
    def paper(rngs: nnx.Rngs) -> MultiCropModel:
        return MultiCropModel(
            create_model("vit_small", patch_size=16, rngs=rngs), DINOHead(384, rngs=rngs)
        )

    shapes = jax.eval_shape(initializer(paper, TX, num_prototypes=65536)[1], jax.random.key(0))
    mesh = sharding.make_mesh()
    assert stored_share(shapes, sharding.state_shardings(shapes, mesh, "dp")) == 1
    assert stored_share(shapes, sharding.state_shardings(shapes, mesh, "fsdp")) < 0.128


# Real steps


def test_initial_state_does_not_depend_on_the_devices(fsdp: Run, single: Run) -> None:
    jax.tree.map(np.testing.assert_array_equal, fsdp.start, single.start)


@pytest.mark.parametrize("mode", ["dp", "fsdp"])
def test_losses_do_not_depend_on_the_devices(
    mode: str, single: Run, request: pytest.FixtureRequest
) -> None:
    assert len(set(single.losses)) == STEPS
    np.testing.assert_allclose(request.getfixturevalue(mode).losses, single.losses, rtol=1e-5)


def test_state_stays_sharded_in_fsdp_mode(fsdp: Run, dp: Run) -> None:
    for tree in ("params", "teacher_params", "opt_state"):
        arrays = jax.tree.leaves(getattr(fsdp.end, tree))
        large = [a for a in arrays if a.size >= sharding.FSDP_MIN_SIZE]
        assert large, tree
        for array in large:
            assert len({shard.device for shard in array.addressable_shards}) == 8
            assert {shard.data.size for shard in array.addressable_shards} == {array.size // 8}
        stored = sum(a.addressable_shards[0].data.size for a in arrays)
        assert stored < 0.17 * sum(a.size for a in arrays), tree
    everywhere = [a.sharding.is_fully_replicated for a in jax.tree.leaves(dp.end)]
    assert all(everywhere)


@pytest.mark.parametrize("mode", ["single", "dp", "fsdp"])
def test_step_donates_its_state(mode: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(mode).donated


# Communication between devices


@pytest.mark.compiler
def test_initial_state_is_created_in_shards() -> None:
    """In fsdp mode no device computes, stores or receives a whole large array."""
    shardings = sharding.state_shardings(SHAPES, sharding.make_mesh(), "fsdp")
    program = jax.jit(INIT, out_shardings=shardings).lower(jax.random.key(0)).compile().as_text()
    pairs = zip(jax.tree.leaves(SHAPES), jax.tree.leaves(shardings), strict=True)
    parts = {array.shape: where.shard_shape(array.shape) for array, where in pairs}
    spread = {whole: part for whole, part in parts.items() if whole != part}
    assert (64, 256) in spread
    for whole, part in spread.items():
        assert f"[{','.join(map(str, part))}]" in program
        assert f"[{','.join(map(str, whole))}]" not in program
    assert not moved(program)


@pytest.mark.compiler
def test_single_device_has_no_collectives(single: Run) -> None:
    assert not moved(single.program)


PARAMETERS = jax.tree.leaves(SHAPES.params)
SPREAD = sum(p.size for p in PARAMETERS if p.size >= sharding.FSDP_MIN_SIZE)
WHOLE = sum(p.size for p in PARAMETERS) - SPREAD
# Elements averaged over the images: the teacher's logits, its distributions and three scalars.
MEANS = 2 * K + 3


@pytest.mark.compiler
def test_dp_sums_only_gradients_and_means(dp: Run) -> None:
    assert moved(dp.program) == {"all-reduce": WHOLE + SPREAD + MEANS}


@pytest.mark.compiler
def test_fsdp_gathers_weights_once_per_network_and_scatters_gradients(fsdp: Run) -> None:
    found = moved(fsdp.program)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["all-gather"] == 2 * SPREAD
    assert found["reduce-scatter"] == SPREAD // 8
    # The norms of sharded gradients need more sums: one per parameter for clipping, and one for all
    # gradients together.
    assert WHOLE + MEANS < found["all-reduce"] <= WHOLE + MEANS + len(PARAMETERS) + 2


@pytest.mark.compiler
def test_accumulated_gradients_are_summed_over_devices_once(single: Run) -> None:
    """They are summed after the last micro-batch, not after each."""
    run = Run.of(8, "dp", single.start, accumulation_steps=2)
    np.testing.assert_allclose(run.losses, single.losses, rtol=1e-5)
    assert moved(run.program) == {"all-reduce": WHOLE + SPREAD + MEANS}
    loops = re.findall(r"body=%([\w.-]+)", run.program)
    bodies = [run.program.split(f"\n%{loop} (")[1].split("\n}\n")[0] for loop in loops]
    assert any("transpose(jvp(" in body for body in bodies), "no loop is the backward pass"
    assert not any(moved(body) for body in bodies)
