"""Loads models by hub name, file or folder."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from dino_jax.checkpoints.damage import DamagedCheckpoint
from dino_jax.config.build import model_spec
from dino_jax.config.spec import ModelSpec
from dino_jax.errors import UsageError, about, listed
from dino_jax.models.network import abstract, split
from dino_jax.weights.info import WeightsInfo
from dino_jax.weights.layouts.architecture import infer
from dino_jax.weights.layouts.mapping import shape_problems, to_ours, torch_shapes
from dino_jax.weights.layouts.torch_checkpoint import TorchNetwork, read_torch_checkpoint
from dino_jax.weights.locate import find_file, folder_and_step

PyTree = Any

WHICH = ("teacher", "student", "untrained")
# Settings that do not change the features, except by rounding.
_NOT_HASHED = ("drop_path_rate", "attention", "remat", "dtype")


def load(
    weights: str | Path,
    *,
    which: str = "teacher",
    num_heads: int | None = None,
    dtype: str | None = None,
) -> tuple[nnx.Module, WeightsInfo]:
    """Loads a backbone with its weights, ready for evaluation.

    Args:
      weights: a hub name (a key of `hub.RELEASED`); a `.pth` file of the original DINO, or of a
        torchvision ResNet; a folder written by `convert`; a run's workdir, for its latest
        checkpoint, or `WORKDIR@STEP`.
      which: "teacher", which usually has better features, "student", or "untrained" for the same
        network with random weights. For a hub name, "student" downloads the full checkpoint.
      num_heads: attention heads of a ViT in a `.pth` file; see `architecture.infer`.
      dtype: compute dtype, "float32" (default) or "bfloat16". Parameters stay float32.
    Returns: (backbone, info). The backbone maps normalized images [B, H, W, C] to features [B, D];
      `info.preprocess` prepares these images.
    Raises:
      UsageError: the weights cannot be loaded or do not contain `which`, or the step does not
        exist.

    Example:
      model, info = dino_jax.load("dino_vits16")
      features = model(info.preprocess(PIL.Image.open("cat.jpg")))  # [1, 384]
    """
    model, info = _load(weights, which, num_heads, dtype, head=False)
    return model.backbone, info


def load_with_head(
    weights: str | Path,
    *,
    which: str = "teacher",
    num_heads: int | None = None,
    dtype: str | None = None,
) -> tuple[nnx.Module, nnx.Module, WeightsInfo]:
    """Loads a backbone and its projection head.

    Args: as for `load`. For a hub name, this downloads the full checkpoint.
    Returns: (backbone, head, info); the head maps features [B, D] to logits [B, K].
    Raises:
      UsageError: as for `load`, or the weights do not contain a head.
    """
    model, info = _load(weights, which, num_heads, dtype, head=True)
    return model.backbone, model.head, info


def _load(
    weights: str | Path, which: str, num_heads: int | None, dtype: str | None, *, head: bool
) -> tuple[nnx.Module, WeightsInfo]:
    """Loads a model in evaluation mode, with or without its head."""
    if which not in WHICH:
        raise UsageError(f"which={which!r} is unknown: choose one of {', '.join(WHICH)}")
    stored = "student" if which == "student" else "teacher"
    file = find_file(weights, "full" if head or stored == "student" else "backbone")
    if file is None:
        spec, arrays, source = _read_model(str(weights), stored, head)
    else:
        spec, arrays = _read_file(file, str(weights), stored, num_heads, head)
        source = str(weights)
    spec = dataclasses.replace(spec, dtype=dtype or "float32")
    graphdef, *_ = abstract(spec.model)
    if which == "untrained":
        _, *random = split(spec.model(nnx.Rngs(0)))
        arrays = dict(zip(("params", "batch_stats"), random, strict=True))
    model = nnx.merge(graphdef, arrays["params"], arrays["batch_stats"])
    model.eval()
    info = WeightsInfo(
        arch=spec.arch,
        patch_size=model.backbone.patch_size,
        embed_dim=model.backbone.embed_dim,
        num_heads=getattr(model.backbone, "num_heads", None),
        num_registers=0,
        source=source,
        sha256=backbone_hash(spec, arrays),
        which=which,
        dtype=spec.dtype,
        resize=spec.resize,
        crop=spec.crop,
        canvas_size=spec.canvas_size,
        mean=spec.mean,
        std=spec.std,
    )
    return model, info


def _read_file(
    file: Path, name: str, which: str, num_heads: int | None, head: bool
) -> tuple[ModelSpec, dict[str, PyTree]]:
    """Reads a network from a `.pth` file and copies its arrays to the device."""
    found = read_torch_checkpoint(file)
    if found.kind == "linear":
        raise UsageError(
            f"{name} is a linear classifier: give a backbone; `dino_jax.load_linear` loads "
            "classifiers"
        )
    with about(name):
        network = found.network(which)
        if not head:
            network = TorchNetwork(network.backbone, {})
        spec, arrays = from_torch(network, num_heads=num_heads)
        if head and spec.head is None:
            raise UsageError("it contains a backbone without a head: give a full checkpoint")
    return spec, jax.tree.map(jnp.array, arrays)  # copies, so that the file's memory is freed


def from_torch(
    network: TorchNetwork, *, num_heads: int | None = None
) -> tuple[ModelSpec, dict[str, PyTree]]:
    """The spec inferred from a torch network's tensors, and its arrays as from `arrays_of`."""
    spec = infer(network, num_heads=num_heads)
    return spec, arrays_of(network, spec)


def arrays_of(network: TorchNetwork, spec: ModelSpec) -> dict[str, PyTree]:
    """Converts a torch network's tensors to our layout.

    Args:
      network: the tensors.
      spec: the spec, from `from_torch`.
    Returns: {params, batch_stats}, each with backbone and head, as float32 NumPy arrays, mostly
      views of the tensors.
    Raises:
      UsageError: tensors are unexpected, missing or have other shapes.
    """
    parts = {"backbone": (network.backbone, spec.family)}
    if spec.head is not None:
        parts["head"] = network.head, "head"
    _, *shapes = abstract(spec.model)
    expected = {
        part: torch_shapes(
            *(tree.get(part, {}) for tree in shapes), family, in_channels=len(spec.mean)
        )
        for part, (_, family) in parts.items()
    }
    found = {part: tensors for part, (tensors, _) in parts.items()}
    if problems := shape_problems(found, expected):
        raise UsageError(f"not the tensors of a {spec.arch}: {listed(problems, 10, '; ')}")
    unusable = [
        f"{part}.{name}"
        for part, tensors in found.items()
        for name, x in tensors.items()
        if not np.isfinite(x).all()
    ]
    if unusable:
        logging.warning("NaN or infinity in the weights (%s)", listed(unusable, limit=10))
    params, batch_stats = {}, {}
    for part, (tensors, family) in parts.items():
        params[part], stats, _ = to_ours(tensors, family)
        batch_stats |= {part: stats} if stats else {}
    arrays = {"params": params, "batch_stats": batch_stats}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)


def without_head(spec: ModelSpec, arrays: dict[str, PyTree]) -> tuple[ModelSpec, dict[str, PyTree]]:
    """The spec and arrays of the backbone alone."""
    backbone = {
        name: {part: x for part, x in tree.items() if part == "backbone"}
        for name, tree in arrays.items()
    }
    return dataclasses.replace(spec, head=None), backbone


def read_folder(
    weights: str, wanted: Callable[[ConfigDict, set[str]], dict[str, PyTree]]
) -> tuple[ConfigDict, dict[str, PyTree], str]:
    """Reads items of a checkpoint in a run's folder or a converted folder, onto one device.

    Args:
      weights: the folder, or FOLDER@STEP.
      wanted: maps the checkpoint's config and the names of its items to the abstract items to
        read.
    Returns: the config, the items, and FOLDER@STEP.
    Raises:
      UsageError: the checkpoint does not exist or cannot be read.
    """
    from dino_jax.checkpoints import read  # here, because Orbax is slow to import

    folder, step = folder_and_step(weights)
    manager = read.open_for_reading(folder)
    try:
        step = read.choose(manager, step)
        config = ConfigDict(read.read_about(manager, step)["config"])
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            wanted(config, read.items_of(manager, step)),
        )
        items = read.read_items(manager, step, shapes)
    except DamagedCheckpoint as error:
        steps = sorted(set(manager.all_steps()) - {step})
        others = ", ".join(f"{folder}@{s}" for s in steps) or "none"
        raise UsageError(f"{folder}: {error}; other checkpoints to try: {others}") from error
    finally:
        manager.close()
    return config, items, f"{folder}@{step}"


def _read_model(weights: str, which: str, head: bool) -> tuple[ModelSpec, dict[str, PyTree], str]:
    def wanted(config: ConfigDict, there: set[str]) -> dict[str, PyTree]:
        if config.head is None and (head or which not in there):
            raise UsageError(
                f"{weights} was converted from a backbone and contains only the teacher, without a "
                "head: convert a full checkpoint instead"
            )
        _, params, batch_stats = abstract(model_spec(config).model)
        return {which: {"params": params, "batch_stats": batch_stats}}

    config, items, source = read_folder(weights, wanted)
    spec, arrays = model_spec(config), items[which]
    return (spec, arrays, source) if head else (*without_head(spec, arrays), source)


def backbone_hash(spec: ModelSpec, arrays: dict[str, PyTree]) -> str:
    """SHA-256 of a backbone's arrays and of settings that no array determines, like num_heads.

    Args:
      spec: the model's spec.
      arrays: the model's {params, batch_stats}.
    """
    sizes = {key: value for key, value in spec.sizes.items() if key not in _NOT_HASHED}
    sizes["family"] = spec.family
    trees = tree_hash({name: tree.get("backbone", {}) for name, tree in arrays.items()})
    return hashlib.sha256(json.dumps([sizes, trees], sort_keys=True).encode()).hexdigest()


def tree_hash(tree: Any) -> str:
    """SHA-256 over the names, shapes and bytes of a tree's arrays."""
    digest = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        name = jax.tree_util.keystr(path)
        digest.update(json.dumps([name, array.shape, str(array.dtype)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
