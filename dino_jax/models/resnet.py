"""Torchvision's ResNets, without the classifier (He et al., arXiv 1512.03385).

They are "v1.5": the stride of a bottleneck is in its 3x3 convolution. Also ResNeXt (Xie et al.,
arXiv 1611.05431) and wide ResNets (Zagoruyko & Komodakis, arXiv 1605.07146).

Dims: B images, H and W pixels, C channels, D width of the features.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
from flax import nnx
from flax.typing import Dtype

from dino_jax.errors import UsageError
from dino_jax.models.conv import ConvNorm
from dino_jax.models.layers import at_least_float32, check_counts, check_images
from dino_jax.models.remat import check_remat, run_block

STAGE_WIDTHS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4  # output channels of a bottleneck / width of its stage

# Kaiming's normal initializer for ReLU, by the fan-out.
relu_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
conv_norm = partial(ConvNorm, kernel_init=relu_init)


class ResidualBlock(nnx.Module):
    """A residual block; its shortcut is the identity if input and output have the same shape.

    Args:
      in_features: channels of the input.
      width: width of the stage.
      stride: stride of the block.
      bottleneck: use three convolutions, 1x1, 3x3 and 1x1, instead of two 3x3 ones.
      groups: groups of a bottleneck's 3x3 convolution.
      width_per_group: channels per group, for a stage of width 64.
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        stride: int,
        bottleneck: bool,
        groups: int,
        width_per_group: int,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> None:
        make = partial(conv_norm, dtype=dtype, rngs=rngs)
        self.out_features = width * (BOTTLENECK_EXPANSION if bottleneck else 1)
        if bottleneck:
            inner = width * width_per_group // 64 * groups
            layers = [
                make(in_features, inner, 1),
                make(inner, inner, 3, stride=stride, groups=groups),
                make(inner, self.out_features, 1),
            ]
        else:
            layers = [make(in_features, width, 3, stride=stride), make(width, width, 3)]
        self.layers = nnx.List(layers)
        same = stride == 1 and in_features == self.out_features
        self.shortcut = None if same else make(in_features, self.out_features, 1, stride=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out]."""
        *first, last = self.layers
        y = x
        for layer in first:
            y = jax.nn.relu(layer(y))
        return jax.nn.relu(last(y) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Images to features: the mean over all pixels after the last stage.

    Args:
      depths: number of blocks of each of the four stages.
      bottleneck: use bottleneck blocks; the features then have width 2048, else 512.
      groups: groups of each bottleneck's 3x3 convolution; more than 1 make a ResNeXt.
      width_per_group: channels per group in the first stage; more than 64 make a wide ResNet.
      in_channels: channels of the images.
      remat: what the backward pass recomputes: "none", "dots" or "full".
      dtype: compute dtype; None computes in the parameters' dtype.
      rngs: source of the initial weights.

    Raises:
      UsageError: invalid sizes, groups without bottlenecks, or an unknown `remat`.
    """

    family: ClassVar[str] = "resnet"
    patch_size: ClassVar[None] = None

    def __init__(
        self,
        *,
        depths: Sequence[int],
        bottleneck: bool,
        groups: int = 1,
        width_per_group: int = 64,
        in_channels: int = 3,
        remat: str = "none",
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_counts(groups=groups, width_per_group=width_per_group, in_channels=in_channels)
        check_remat(remat)
        if not bottleneck and (groups, width_per_group) != (1, 64):
            raise UsageError(
                f"groups={groups}, width_per_group={width_per_group}: without bottlenecks these "
                "must be 1 and 64; set bottleneck=True to change them"
            )
        if len(depths) != 4 or min(depths) < 1:
            raise UsageError(f"depths={depths} must be four whole numbers of at least 1")
        self.in_channels = in_channels
        self.remat = remat
        self.stem = conv_norm(in_channels, 64, 7, stride=2, dtype=dtype, rngs=rngs)
        features, stages = 64, []
        for width, depth in zip(STAGE_WIDTHS, depths, strict=True):
            blocks = []
            for i in range(depth):
                block = ResidualBlock(
                    features,
                    width,
                    stride=2 if stages and i == 0 else 1,  # every later stage halves the image
                    bottleneck=bottleneck,
                    groups=groups,
                    width_per_group=width_per_group,
                    dtype=dtype,
                    rngs=rngs,
                )
                features = block.out_features
                blocks.append(block)
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.embed_dim = features

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Features of images.

        Args:
          images: [B, H, W, C] float, normalised; any H and W.
          keys: ignored, because a ResNet has no stochastic depth.
        Returns: [B, D], float32 (float64 for float64 weights).
        """
        del keys
        check_images(images, self.in_channels, 1, "one pixel")
        x = jax.nn.relu(self.stem(images))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            for block in stage:
                x = run_block(block, self.remat, x)
        return at_least_float32(x).mean((1, 2))


basic = partial(ResNet, bottleneck=False)
bottleneck = partial(ResNet, bottleneck=True)

ARCHITECTURES = {
    "resnet18": partial(basic, depths=(2, 2, 2, 2)),
    "resnet34": partial(basic, depths=(3, 4, 6, 3)),
    "resnet50": partial(bottleneck, depths=(3, 4, 6, 3)),
    "resnet101": partial(bottleneck, depths=(3, 4, 23, 3)),
    "resnet152": partial(bottleneck, depths=(3, 8, 36, 3)),
    "resnext50_32x4d": partial(bottleneck, depths=(3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": partial(bottleneck, depths=(3, 4, 23, 3), groups=32, width_per_group=8),
    "wide_resnet50_2": partial(bottleneck, depths=(3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": partial(bottleneck, depths=(3, 4, 23, 3), width_per_group=128),
}
