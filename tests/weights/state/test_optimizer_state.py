"""Converting torch's optimizer states, which identify parameters by number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dino_jax.errors import UsageError
from dino_jax.training import optim
from dino_jax.weights.layouts.torch_checkpoint import TorchNetwork, read_torch_checkpoint
from dino_jax.weights.load import from_torch
from dino_jax.weights.state.optimizer_state import norms_are_fixed, optimizer_state
from tests.conftest import GOLDENS

# Some decayed parameters in the order of the modules, then some biases and 1-D parameters.
NUMBERS = {
    ("backbone", "cls_token"): 0,
    ("backbone", "pos_embed"): 1,
    ("backbone", "patch_embed", "kernel"): 2,
    ("backbone", "blocks", 0, "attn", "qkv", "kernel"): 3,
    ("backbone", "blocks", 1, "mlp", "fc2", "kernel"): 10,
    ("head", "layers", 0, "kernel"): 11,
    ("head", "layers", 2, "kernel"): 13,
    ("head", "last_layer", "v"): 14,
    ("backbone", "patch_embed", "bias"): 15,
    ("backbone", "blocks", 0, "norm1", "scale"): 16,
    ("backbone", "blocks", 0, "norm1", "bias"): 17,
    ("backbone", "norm", "bias"): 33,
    ("head", "layers", 2, "bias"): 36,
}


@pytest.fixture(scope="module")
def student() -> TorchNetwork:
    return read_torch_checkpoint(GOLDENS / "pth/full_checkpoint.pth").network("student")


@pytest.fixture(scope="module")
def shapes(student: TorchNetwork) -> list[tuple[int, ...]]:
    """The shapes of the parameters by torch's numbers, from the optimizer state saved by torch."""
    state = read_torch_checkpoint(GOLDENS / "pth/full_checkpoint.pth").optimizer["state"]
    return [state[i]["exp_avg"].shape for i in range(len(state))]


def saved(shapes: list[tuple[int, ...]], **entries: Callable[[int], float]) -> dict[str, Any]:
    """A torch optimizer's state; each option `name=function` computes a moment from the number."""

    def entry(i: int) -> dict[str, Any]:
        scalar = {n: np.array(f(i), np.float32) for n, f in entries.items() if n == "step"}
        return scalar | {
            name: np.full(shapes[i], fill(i), np.float32)
            for name, fill in entries.items()
            if name != "step"
        }

    numbers = list(range(len(shapes)))
    return {
        "state": {i: entry(i) for i in numbers},
        "param_groups": [{"params": numbers[:15]}, {"params": numbers[15:]}],
    }


def adamw(shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    return saved(shapes, step=lambda i: 9, exp_avg=float, exp_avg_sq=lambda i: i + 0.5)


def start(student: TorchNetwork, name: str, *, fixed: bool = True) -> optax.OptState:
    tx = optim.make_optimizer(name, clip_grad=0, norm_last_layer=fixed)
    return tx.init(jax.tree.map(jnp.asarray, from_torch(student)[1]["params"]))


def nodes(state: optax.OptState, kind: type) -> dict[str, Any]:
    """The state's node of this kind in each group."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, kind))
    named = [([getattr(key, "key", None) for key in path], x) for path, x in leaves]
    return {
        group: x
        for path, x in named
        for group in ("body", "last_layer")
        if group in path and isinstance(x, kind)
    }


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def group_of(path: tuple[Any, ...]) -> str:
    return "last_layer" if "last_layer" in path else "body"


def test_each_moment_belongs_to_its_parameter(
    student: TorchNetwork, shapes: list[tuple[int, ...]]
) -> None:
    state = optimizer_state(adamw(shapes), student, start(student, "adamw"), "adamw")
    adam = nodes(state, optax.ScaleByAdamState)
    assert {group: int(node.count) for group, node in adam.items()} == {"body": 9, "last_layer": 9}
    for path, number in NUMBERS.items():
        node = adam[group_of(path)]
        assert set(np.unique(at(node.mu, path))) == {number}, path
        assert set(np.unique(at(node.nu, path))) == {number + 0.5}, path
    expected = start(student, "adamw")
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert all(
        (x.shape, x.dtype) == (y.shape, y.dtype)
        for x, y in zip(*map(jax.tree.leaves, (state, expected)), strict=True)
    )


@pytest.mark.parametrize(("name", "key"), [("sgd", "momentum_buffer"), ("lars", "mu")])
def test_momentum(
    name: str, key: str, student: TorchNetwork, shapes: list[tuple[int, ...]]
) -> None:
    state = optimizer_state(saved(shapes, **{key: float}), student, start(student, name), name)
    traces = nodes(state, optax.TraceState)
    for path, number in NUMBERS.items():
        assert set(np.unique(at(traces[group_of(path)].trace, path))) == {number}, path


def test_last_layer_that_was_never_trained(
    student: TorchNetwork, shapes: list[tuple[int, ...]]
) -> None:
    found = adamw(shapes)
    del found["state"][14]
    state = optimizer_state(found, student, start(student, "adamw"), "adamw")
    adam = nodes(state, optax.ScaleByAdamState)
    assert {group: int(node.count) for group, node in adam.items()} == {"body": 9, "last_layer": 0}
    assert not np.any(at(adam["last_layer"].mu, ("head", "last_layer", "v")))
    assert np.all(at(adam["body"].mu, ("head", "layers", 0, "kernel")) == 11)


def test_trained_norms(student: TorchNetwork, shapes: list[tuple[int, ...]]) -> None:
    """The norms precede the directions, as in the module."""
    assert norms_are_fixed(adamw(shapes), student)
    with_norms = [*shapes[:14], (96, 1), *shapes[14:]]
    found = adamw(with_norms)
    assert not norms_are_fixed(found, student)
    state = optimizer_state(found, student, start(student, "adamw", fixed=False), "adamw")
    moments = nodes(state, optax.ScaleByAdamState)["last_layer"].mu["head"]["last_layer"]
    assert set(np.unique(moments["g"])) == {14}
    assert set(np.unique(moments["v"])) == {15}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("param_groups"), "has no param_groups, so it is not torch's"),
        (lambda f: f.update(param_groups=[3]), "has no param_groups"),
        (lambda f: f["param_groups"].pop(), "has 15 parameters, but the student has 38"),
        (lambda f: f["param_groups"].reverse(), "has 37 parameters, but the student has"),
        (lambda f: f.pop("state"), "lacks exp_avg and exp_avg_sq, .* for 36 parameters"),
        (lambda f: f["state"].pop(16), r"for 1 parameters, such as backbone\.blocks\.0\.norm1\.w"),
        (lambda f: f["state"][3].update(exp_avg=np.ones(3)), "such as backbone.blocks.0.attn.qkv"),
        (lambda f: f["state"].update({3: None}), "it does not belong to adamw for this"),
        (lambda f: f["state"][20].update(step=8), r"different step counts \(\[8, 9\]\)"),
        (lambda f: f["state"][20].pop("step"), "has no valid step count"),
        (lambda f: f["state"][20].update(step=float("nan")), "has no valid step count"),
        (lambda f: f["state"][20].update(step=float("inf")), "has no valid step count"),
        (lambda f: f["state"][20].update(step=2**40), "has no valid step count"),
    ],
)
def test_rejects(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    student: TorchNetwork,
    shapes: list[tuple[int, ...]],
) -> None:
    found = adamw(shapes)
    change(found)
    with pytest.raises(UsageError, match=message):
        optimizer_state(found, student, start(student, "adamw"), "adamw")
