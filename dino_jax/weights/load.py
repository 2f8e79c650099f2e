"""From the name of some weights to a model that holds them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from dino_jax.checkpoints.damage import DamagedCheckpoint
from dino_jax.config import build as settings
from dino_jax.errors import UsageError, about
from dino_jax.models import MODELS, default_settings
from dino_jax.models.network import abstract, split
from dino_jax.weights.layouts.architecture import EVAL_SIZES, IMAGENET, infer
from dino_jax.weights.layouts.mapping import shape_problems, to_ours, torch_shapes
from dino_jax.weights.layouts.torch_checkpoint import Tensors, TorchNetwork, read_torch_checkpoint
from dino_jax.weights.locate import find_file, folder_and_step

PyTree = Any

WHICH = ("teacher", "student", "untrained")
# Of no feature, or of its rounding alone.
_OF_TRAINING = ("drop_path_rate", "attention", "remat", "dtype")


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """What a model that was loaded is, and where it is from."""

    arch: str  # a key of `models.MODELS`
    patch_size: int | None  # pixels; None for a ResNet
    embed_dim: int  # width of the features
    source: str  # as given to `load`, with the step
    sha256: str  # of all that decides the features but the dtype: the same weights have the same
    which: str  # of `WHICH`
    dtype: str  # that it computes in
    resize: int  # pixels: how its images are prepared, as `evaluate.features.EvalTransform`
    crop: int
    canvas_size: int
    mean: tuple[float, ...]  # of each channel in 0..1, subtracted from its input
    std: tuple[float, ...]


def load(
    weights: str | Path,
    *,
    which: str = "teacher",
    head: bool = False,
    num_heads: int | None = None,
    dtype: str | None = None,
) -> tuple[nnx.Module, WeightsInfo] | tuple[nnx.Module, nnx.Module, WeightsInfo]:
    """Loads a model with its weights, ready for evaluation.

    Args:
      weights: a hub name (a key of `hub.RELEASED`); a `.pth` file of the reference, or of
        torchvision's ResNets; a folder that `convert` made; a run folder (its workdir), for the
        latest checkpoint, or `WORKDIR@STEP`.
      which: "teacher", whose features are the better ones, or "student"; "untrained" is the same
        network with random weights, to compare with. Of a hub name the student comes with the
        whole checkpoint, a larger download; so does the head.
      head: return the projection head too.
      num_heads: attention heads of a ViT in a `.pth` file, whose tensors do not tell; see
        `architecture.infer`.
      dtype: to compute in: "float32", "bfloat16", or "auto" for the device's usual one; unset, as
        the run was configured, and float32 for a `.pth` file.
    Returns: (backbone, info), or (backbone, head, info). Of a linear classifier's `.pth` file
      (classifier, info), which maps features [B, embed_dim] to logits.
    Raises:
      UsageError: nothing there can be loaded; it lacks what is asked for; the step does not exist.

    Example:
      model, info = dino_jax.load("dino_vits16")
      features = model(images)  # [B, H, W, C] normalised -> [B, D]
    """
    if which not in WHICH:
        raise UsageError(f"which={which!r} is unknown: choose one of {', '.join(WHICH)}")
    stored = "student" if which == "student" else "teacher"
    file = find_file(weights, "full" if head or stored == "student" else "backbone")
    if file is None:
        config, arrays, source = _read_model(str(weights), stored, head)
    else:
        found = read_torch_checkpoint(file)
        if found.kind == "linear":
            if head or which == "student":
                raise UsageError(f"{weights} is a linear classifier: it has no student and no head")
            return _linear(found.linear, str(weights))
        with about(weights):
            config, arrays = from_torch(found.network(stored), num_heads=num_heads)
            if head and config.head is None:
                raise UsageError("it holds a backbone alone: give the whole checkpoint for a head")
        if not head:
            config, arrays = without_head(config, arrays)
        arrays, source = jax.tree.map(jnp.array, arrays), str(weights)  # no longer of the file
    if dtype is not None:
        config.model.dtype = dtype
    graphdef, *_ = abstract(partial(build, config))
    if which == "untrained":
        _, *random = split(build(config, nnx.Rngs(0)))
        arrays = dict(zip(("params", "batch_stats"), random, strict=True))
    model = nnx.merge(graphdef, arrays["params"], arrays["batch_stats"])
    model.eval()
    info = WeightsInfo(
        arch=config.model.name,
        patch_size=model.backbone.patch_size,
        embed_dim=model.backbone.embed_dim,
        source=source,
        sha256=backbone_hash(config, arrays),
        which=which,
        dtype=jnp.dtype(settings.compute_dtype(config.model.dtype)).name,
        resize=config.eval.resize,
        crop=config.eval.crop,
        # Folders converted before do not say.
        canvas_size=config.eval.get("canvas_size", EVAL_SIZES["canvas_size"]),
        mean=tuple(config.crops.mean),
        std=tuple(config.crops.std),
    )
    return (model.backbone, model.head, info) if head else (model.backbone, info)


class Backbone(nnx.Module):
    """A backbone alone, under the name that it has in a whole model."""

    def __init__(self, backbone: nnx.Module) -> None:
        self.backbone = backbone


def build(config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a config, without a head where the config has none."""
    if config.head is None:
        return Backbone(settings.build_backbone(config, rngs))
    return settings.build_model(config, rngs)


def from_torch(
    network: TorchNetwork, *, num_heads: int | None = None
) -> tuple[ConfigDict, dict[str, PyTree]]:
    """A torch network's config, as far as tensors tell it, and its arrays; see `arrays_of`."""
    config = ConfigDict(infer(network, num_heads=num_heads))
    return config, arrays_of(network, config)


def arrays_of(network: TorchNetwork, config: ConfigDict) -> dict[str, PyTree]:
    """A torch network's arrays in our layout.

    Args:
      network: its tensors.
      config: as `from_torch` tells it.
    Returns: {params, batch_stats}, with backbone and head in each, as NumPy arrays in float32,
      mostly views of the tensors.
    Raises:
      UsageError: names every tensor that is left over, missing or of another shape.
    """
    parts = {"backbone": (network.backbone, MODELS[config.model.name].func.family)}
    if config.head is not None:
        parts["head"] = network.head, "head"
    _, *shapes = abstract(partial(build, config))
    expected = {
        part: torch_shapes(
            *(tree.get(part, {}) for tree in shapes), family, in_channels=len(config.crops.mean)
        )
        for part, (_, family) in parts.items()
    }
    found = {part: tensors for part, (tensors, _) in parts.items()}
    if problems := shape_problems(found, expected):
        raise UsageError(f"not the tensors of a {config.model.name}: {'; '.join(problems)}")
    params, batch_stats = {}, {}
    for part, (tensors, family) in parts.items():
        params[part], stats, _ = to_ours(tensors, family)
        batch_stats |= {part: stats} if stats else {}
    arrays = {"params": params, "batch_stats": batch_stats}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)


def without_head(
    config: ConfigDict, arrays: dict[str, PyTree]
) -> tuple[ConfigDict, dict[str, PyTree]]:
    """The backbone alone of what `from_torch` returns."""
    config = ConfigDict(config.to_dict() | {"head": None})
    return config, {
        name: {part: x for part, x in tree.items() if part == "backbone"}
        for name, tree in arrays.items()
    }


def _linear(tensors: Tensors, name: str) -> tuple[nnx.Linear, WeightsInfo]:
    """A linear classifier and what is known of it."""
    params = {"kernel": tensors["weight"].T, "bias": tensors["bias"]}
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    graphdef, *_ = abstract(lambda rngs: nnx.Linear(*params["kernel"].shape, rngs=rngs))
    info = WeightsInfo(
        arch="linear",
        patch_size=None,
        embed_dim=params["kernel"].shape[0],
        source=name,
        sha256=tree_hash(params),
        which="teacher",
        dtype="float32",
        **EVAL_SIZES,
        **IMAGENET,
    )
    return nnx.merge(graphdef, params, {}), info


def read_folder(
    weights: str, wanted: Callable[[ConfigDict, set[str]], dict[str, PyTree]]
) -> tuple[ConfigDict, dict[str, PyTree], str]:
    """Items of a checkpoint in a run's folder or a converted one, on one device.

    Args:
      weights: the folder, or FOLDER@STEP.
      wanted: from the config of the checkpoint and the names of its items to the shapes of those
        that are to be read.
    Returns: the config, the items, and FOLDER@STEP.
    Raises:
      UsageError: there is no such checkpoint, or it cannot be read.
    """
    from dino_jax.checkpoints import (
        checkpoint,  # here: Orbax is slow to import, and --help needs none
    )

    folder, step = folder_and_step(weights)
    manager = checkpoint.open_for_reading(folder)
    try:
        step = checkpoint.choose(manager, step)
        config = ConfigDict(checkpoint.read_about(manager, step)["config"])
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            wanted(config, checkpoint.items_of(manager, step)),
        )
        items = checkpoint.read_items(manager, step, shapes)
    except DamagedCheckpoint as error:
        steps = sorted(set(manager.all_steps()) - {step})
        others = ", ".join(f"{folder}@{s}" for s in steps) or "none"
        raise UsageError(f"{folder}: {error}; other checkpoints to try: {others}") from error
    finally:
        manager.close()
    return config, items, f"{folder}@{step}"


def _read_model(weights: str, which: str, head: bool) -> tuple[ConfigDict, dict[str, PyTree], str]:
    def wanted(config: ConfigDict, there: set[str]) -> dict[str, PyTree]:
        if config.head is None and (head or which not in there):
            raise UsageError(
                f"{weights} was converted from a backbone alone: which='teacher' without a head is "
                "all of it"
            )
        _, params, batch_stats = abstract(partial(build, config))
        return {which: {"params": params, "batch_stats": batch_stats}}

    config, items, source = read_folder(weights, wanted)
    return config, items[which], source


def backbone_hash(config: ConfigDict, arrays: dict[str, PyTree]) -> str:
    """SHA-256 over a backbone's arrays and its sizes, some of which no array tells: num_heads.

    Args:
      config: of the model.
      arrays: {params, batch_stats} of the model.
    """
    sizes = default_settings(config.model.name) | {
        "family": MODELS[config.model.name].func.family,
        **{key: value for key, value in config.model.overrides.items() if value is not None},
    }
    if config.model.patch_size is not None:
        sizes["patch_size"] = config.model.patch_size
    sizes = {key: value for key, value in sizes.items() if key not in _OF_TRAINING}
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
