"""The device memory of a run, compared with counts by hand."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dino_jax import memory, sharding
from dino_jax.config.build import model_spec
from dino_jax.memory import device_limit, planned_bytes, stored_bytes
from dino_jax.run.out_of_memory import Need
from dino_jax.run.plan import make_plan
from tests.support import runs


def test_bytes_of_arrays_per_device() -> None:
    mesh = sharding.make_mesh()
    arrays = {
        "spread": jax.ShapeDtypeStruct((16, 3), jnp.float32),
        "whole": jax.ShapeDtypeStruct((5,), jnp.int8),
    }
    shardings = {
        "spread": NamedSharding(mesh, PartitionSpec("data")),
        "whole": sharding.replicated(mesh),
    }
    assert stored_bytes(arrays, shardings) == 16 * 3 * 4 / 8 + 5


@pytest.mark.compiler
def test_bytes_of_a_compiled_function() -> None:
    """A result that reuses the memory of its argument counts once."""

    def update(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return state + 1, x[:10] * 2

    shapes = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (1000, 300)]
    compiled = jax.jit(update, donate_argnums=0).lower(*shapes).compile()
    without = jax.jit(update).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # XLA also counts a table of pointers to the two results.
    results = compiled.memory_analysis().output_size_in_bytes - 4000 - 40
    assert planned_bytes(compiled) == 4000 + 1200 + 40 + results + temporary
    assert planned_bytes(without) == planned_bytes(compiled) + 4000


def test_backend_without_memory_analysis() -> None:
    compiled = SimpleNamespace(memory_analysis=lambda: None)
    assert planned_bytes(compiled) is None
    need = Need(state=3 << 29, limit=None).with_step(compiled)
    assert need.step is None
    assert need.fits
    assert str(need) == "per device 1.50 GiB for the state"


def test_the_smallest_device_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def mesh(*limits: int | None) -> SimpleNamespace:
        stats = [None if n is None else {"bytes_limit": n} for n in limits]
        devices = [SimpleNamespace(platform="gpu", memory_stats=lambda s=s: s) for s in stats]
        return SimpleNamespace(local_devices=devices)

    assert device_limit(mesh(30, 20, 25)) == 20
    assert device_limit(mesh(None)) is None
    monkeypatch.setattr(memory, "machine_memory", lambda: 80)
    assert device_limit(sharding.make_mesh()) == 10  # eight CPU devices share the machine's memory


def test_a_container_can_limit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (tmp_path / "none", limit))
    whole = memory.machine_memory()
    limit.write_text("max\n")
    assert memory.machine_memory() == whole
    limit.write_text("4096\n")
    assert memory.machine_memory() == 4096


@pytest.mark.parametrize(("limit", "fits"), [(10 << 30, True), ((10 << 30) - 1, False)])
def test_need_fits_the_limit(limit: int, fits: bool) -> None:
    need = Need(state=3 << 30, limit=limit, step=7 << 30)
    assert need.fits == fits
    text = "per device 3.00 GiB for the state and 7.00 GiB during a step, 10.00 GiB available"
    assert str(need) == text


@pytest.mark.parametrize("mode", sharding.MODES)
def test_state_uses_the_memory_predicted_from_shapes(mode: str) -> None:
    mesh = sharding.make_mesh()
    config = runs.tiny_config(train__sharding=mode, head__hidden_dim=256)
    plan = make_plan(config, model_spec(config), mesh, steps_per_epoch=5)
    need = Need.of(plan.shapes, plan.shardings, mesh)
    state = plan.first_state(0)
    for device in mesh.devices:
        held = [
            shard.data.nbytes
            for array in jax.tree.leaves(state)
            for shard in array.addressable_shards
            if shard.device == device
        ]
        assert sum(held) == need.state
