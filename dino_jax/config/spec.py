"""Describes a model as plain values: architecture, sizes, compute dtype and preprocessing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dino_jax.data.transforms.color import IMAGENET_MEAN, IMAGENET_STD
from dino_jax.errors import UsageError
from dino_jax.models import MODELS, DINOHead, create_model, default_settings, vit
from dino_jax.models.network import MultiCropModel

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Sizes of a projection head; see `DINOHead`."""

    out_dim: int  # prototypes K
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    use_bn: bool = False
    weight_norm: bool = True


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a backbone and its optional head.

    Nothing here depends on the machine: the caller chooses dtype and attention kernel.
    """

    arch: str  # a key of `models.MODELS`
    patch_size: int | None = None  # pixels; None: the architecture's default, also for a ResNet
    # Settings that differ from the architecture's defaults: image_size, embed_dim, depth, ...
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: HeadSpec | None = None
    drop_path_rate: float = 0.0
    remat: str = "none"  # none, dots or full
    dtype: str = "float32"  # compute dtype, a key of `DTYPES`
    attention: str = "xla"  # a ViT's attention kernel, one of `attention.KERNELS`
    # Preprocessing (paper, appendix F.1): resize the shorter side, center crop, normalize per
    # channel. Images larger than the canvas are first shrunk to it.
    resize: int = 256
    crop: int = 224
    canvas_size: int = 512
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def family(self) -> str:
        """The architecture's family: "vit", "xcit" or "resnet"."""
        return MODELS[self.arch].func.family

    @property
    def sizes(self) -> dict[str, Any]:
        """All settings that determine the backbone's features."""
        chosen = dict(self.overrides)
        if self.patch_size is not None:
            chosen["patch_size"] = self.patch_size
        return default_settings(self.arch) | chosen

    def backbone(self, rngs: nnx.Rngs) -> nnx.Module:
        """The backbone with random weights, in evaluation mode.

        Raises:
          UsageError: the name is unknown, or the sizes contradict each other.
        """
        optional: dict[str, Any] = {}
        if self.arch in vit.ARCHITECTURES:
            optional["attention"] = self.attention
        if self.drop_path_rate:  # not every architecture has stochastic depth
            optional["drop_path_rate"] = self.drop_path_rate
        return create_model(
            self.arch,
            patch_size=self.patch_size,
            dtype=self._dtype,
            remat=self.remat,
            in_channels=len(self.mean),
            rngs=rngs,
            **self.overrides,
            **optional,
        )

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Backbone and head with random weights, in training mode.

        Returns: a module with the attributes `backbone` and, unless it is None, `head`.
        """
        backbone = self.backbone(rngs)
        if self.head is None:
            return BackboneModel(backbone)
        head = DINOHead(
            backbone.embed_dim, dtype=self._dtype, rngs=rngs, **dataclasses.asdict(self.head)
        )
        model = MultiCropModel(backbone, head)
        model.train()
        return model

    @property
    def _dtype(self) -> Any:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        return DTYPES[self.dtype]


class BackboneModel(nnx.Module):
    """A backbone without a head, with the same parameter paths as in a model with one."""

    def __init__(self, backbone: nnx.Module) -> None:
        self.backbone = backbone
