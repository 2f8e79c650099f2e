"""What the benchmarks count from shapes and programs, and reckon on paper."""

import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dino_jax.models import create_model
from dino_jax.run.out_of_memory import ACTIVATIONS
from tests.support.benchmark_runs import SMALL, run, script


@pytest.mark.parametrize("side", [224, 96])
@pytest.mark.compiler
def test_counted_operations_of_a_forward_pass(side: int) -> None:
    from flops import vit_forward

    model = nnx.eval_shape(lambda: create_model("vit_small", rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    analysed = forward.lower(params, image).cost_analysis()["flops"]
    # What is not counted: norms, softmax, GELU, biases, and the resized position table.
    assert 0.95 < sum(vit_forward(model, side)) / analysed <= 1


def test_operations_of_a_training_step() -> None:
    from flops import flops_per_image

    from configs import vit_small

    # 9.2 GFLOP a pass for 224 pixels (published) and 1.6 for 96: 2 passes of the teacher, 3 of the
    # student for each view, the head: 113.5. The last block for one token saves 7 % of it.
    assert flops_per_image(vit_small.get_config()) == pytest.approx(0.931 * 113.5e9, rel=0.01)


def test_scaling_wants_nodes_of_gpus() -> None:
    done = run(sys.executable, "benchmarks/scaling.py", *SMALL, "--step-ms=1", "--node=0")
    assert done.returncode == 1
    assert done.stderr.strip() == "--node=0: give the GPUs of a node, at least 1"


def test_activations_are_below_what_the_advice_reckons_with() -> None:
    depth = "--config.model.overrides.depth=4"
    result = script("activations", SMALL[0], depth, "--config.model.dtype=bfloat16")
    assert result["benchmark"] == "activations"
    kept, share = result["kept_mb"], result["share"]
    assert kept["none"] == pytest.approx(0.329, rel=0.02)  # GELU and LayerNorm keep inputs alone
    assert kept["none"] > kept["dots"] > kept["full"] > 0
    assert share["dots"] == pytest.approx(kept["dots"] / kept["none"], abs=0.01)
    assert share["none"] == 1
    assert all(share[policy] <= ACTIVATIONS[policy] for policy in ACTIVATIONS)


def test_seconds_of_a_collective() -> None:
    """64 GB over two nodes of four: 48 GB arrive by links, and 8 of a quarter by the network."""
    from scaling import Cluster, efficiency

    cluster = Cluster(node=4, link=12e9, network=1e9)
    assert cluster.one_way_seconds(64e9, 8) == pytest.approx(48 / 12 + 16 / 2)
    assert cluster.one_way_seconds(64e9, 4) == pytest.approx(48 / 12)
    assert efficiency(30, 10) == {"none": 0.75, "full": 1}
    assert efficiency(10, 40) == {"none": 0.2, "full": 0.25}


def test_bytes_of_collectives() -> None:
    from collectives import moved_bytes

    program = """
      %a = (f32[2,3]{1,0}, s32[]) all-reduce(%x, %y), replica_groups={}
      %b = bf16[10]{0} all-gather(%z), dimensions={0}
      %c = f32[5]{0} add(%p, %q)
      ROOT %d = pred[7]{0} all-reduce(%e)
    """
    assert moved_bytes(program) == {"all-reduce": 24 + 4 + 7, "all-gather": 20}
