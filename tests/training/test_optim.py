"""Optimizers, compared with NumPy formulas and, if it is installed, with torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dino_jax.errors import UsageError
from dino_jax.models import DINOHead, VisionTransformer
from dino_jax.models.network import MultiCropModel, abstract
from dino_jax.training import optim
from tests.support.optimizer_steps import (
    DECAYED,
    LEARNING_RATES,
    STEPS,
    WEIGHT_DECAYS,
    PyTree,
    assert_equal_params,
    expected_params,
    gradients,
    random_arrays,
    run,
)


@pytest.mark.parametrize("frozen_steps", [0, 2])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_steps_equal_the_formula(name: str, frozen_steps: int) -> None:
    found, _ = run(name, frozen_steps=frozen_steps)[-1]
    assert_equal_params(found, expected_params(name, frozen_steps))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_equal_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = random_arrays(0)
    tensors = {key: torch.tensor(array, requires_grad=True) for key, array in arrays.items()}
    kept = [tensor for key, tensor in tensors.items() if key not in DECAYED]
    groups = [{"params": [tensors[key] for key in sorted(DECAYED)]}, {"params": kept}]
    theirs = (
        torch.optim.AdamW(groups)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0, momentum=0.9)
    )
    for step in range(STEPS):
        theirs.param_groups[0]["weight_decay"] = WEIGHT_DECAYS[step]
        theirs.param_groups[1]["weight_decay"] = 0.0
        for group in theirs.param_groups:
            group["lr"] = LEARNING_RATES[step]
        for key, gradient in gradients(step).items():
            tensors[key].grad = torch.tensor(gradient)
        theirs.step()
    found, _ = run(name)[-1]
    assert_equal_params(found, {key: t.detach().numpy() for key, t in tensors.items()})


# Decay and clipping


@pytest.fixture(scope="module")
def vit_and_head() -> PyTree:
    def build(rngs: nnx.Rngs) -> MultiCropModel:
        backbone = VisionTransformer(
            patch_size=4, image_size=8, embed_dim=8, depth=1, num_heads=2, rngs=rngs
        )
        return MultiCropModel(backbone, DINOHead(8, 16, hidden_dim=8, use_bn=True, rngs=rngs))

    return abstract(build)[1]


def named(tree: PyTree) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(p.key) for p in path): leaf for path, leaf in flat}


def test_decay_mask_of_a_vit_and_head(vit_and_head: PyTree) -> None:
    mask = named(optim.decay_mask(vit_and_head))
    assert {name.rsplit(".", 1)[-1] for name, decayed in mask.items() if not decayed} == {
        "bias",
        "scale",
    }
    decayed = {name for name, decayed in mask.items() if decayed}
    assert {name.rsplit(".", 1)[-1] for name in decayed} == {
        "kernel", "cls_token", "pos_embed", "g", "v"
    }  # fmt: skip


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_groups_of_a_vit_and_head(vit_and_head: PyTree, norm_last_layer: bool) -> None:
    labels = optim.parameter_labels(vit_and_head, norm_last_layer=norm_last_layer)
    special = {name: label for name, label in named(labels).items() if label != "body"}
    g = "fixed" if norm_last_layer else "last_layer"
    assert special == {"head.last_layer.g": g, "head.last_layer.v": "last_layer"}


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    grads = {"large": np.full((3, 4), 2.0), "small": np.full(5, 0.1), "zero": np.zeros(2)}
    tx = optim.clip_by_parameter_norm(1.5)
    clipped, _ = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(grads), None)
    norm = np.linalg.norm(grads["large"])
    np.testing.assert_allclose(clipped["large"], grads["large"] * 1.5 / (norm + 1e-6), rtol=1e-6)
    np.testing.assert_array_equal(clipped["small"], grads["small"].astype(np.float32))
    np.testing.assert_array_equal(clipped["zero"], grads["zero"])


def test_clipping_precedes_the_optimizer_and_0_disables_it() -> None:
    # The first step of SGD is the learning rate times the clipped gradient plus weight decay.
    start = random_arrays(0)
    for limit in (0.0, 0.5, 1e6):
        moved, _ = run("sgd", clip_grad=limit)[1]
        for key, gradient in gradients(0).items():
            factor = min(1, limit / (np.linalg.norm(gradient) + 1e-6)) if limit else 1
            decay = WEIGHT_DECAYS[0] if key in DECAYED else 0
            step = LEARNING_RATES[0] * (factor * gradient + decay * start[key])
            np.testing.assert_allclose(start[key] - moved[key], step, rtol=1e-9, err_msg=key)


def test_lars_does_not_scale_updates_if_a_norm_is_zero() -> None:
    tx = optim.lars()
    params = {"zero": jnp.zeros((2, 3)), "other": jnp.ones((2, 3))}
    grads = {"zero": jnp.full((2, 3), 0.5), "other": jnp.zeros((2, 3))}
    updates, _ = tx.update(grads, tx.init(params), params, learning_rate=1.0, weight_decay=0.0)
    np.testing.assert_array_equal(updates["zero"], -grads["zero"])
    np.testing.assert_array_equal(updates["other"], grads["other"])


def test_an_unknown_optimizer_lists_the_choices() -> None:
    with pytest.raises(
        UsageError, match="unknown optimizer 'adam': choose one of adamw, sgd, lars"
    ):
        optim.make_optimizer("adam", clip_grad=0.0, norm_last_layer=True)
