"""Floating-point operations of a training step, counted from the shapes of its matrix products.

Dims: N tokens, D width, M hidden width of the MLP, K prototypes.
"""

from itertools import pairwise

from flax import nnx
from ml_collections import ConfigDict

from dino_jax.config import build
from dino_jax.models import VisionTransformer


def vit_forward(backbone: VisionTransformer, side: int) -> tuple[int, int]:
    """FLOPs of the patch embedding and of the blocks for one square image.

    A product [a, b] x [b, c] counts 2abc; norms, softmax, GELU and the resized position table
    (together a few percent) do not count. The last block runs for the class token alone.

    Args:
      backbone: its sizes are read; its arrays may be abstract.
      side: of the image, pixels.
    """
    patch, d = backbone.patch_size, backbone.embed_dim
    m = backbone.blocks[0].mlp.fc1.out_features
    patches = (side // patch) ** 2
    n = patches + 1
    block = 2 * n * (4 * d * d + 2 * d * m) + 4 * n * n * d
    last = 2 * n * 2 * d * d + 2 * (2 * d * d + 2 * d * m) + 4 * n * d
    embed = 2 * patches * patch**2 * backbone.in_channels * d
    return embed, (len(backbone.blocks) - 1) * block + last


def flops_per_image(config: ConfigDict) -> float | None:
    """FLOPs of a step for each image of the batch, without making crops; None if no ViT.

    A backward pass costs twice its forward pass, less the gradient of the images. What
    rematerialisation computes again does not count: it is no work of the algorithm.
    """
    model = nnx.eval_shape(lambda: build.build_model(config, nnx.Rngs(0)))
    if not isinstance(model.backbone, VisionTransformer):
        return None
    widths = [model.backbone.embed_dim, *(layer.out_features for layer in model.head.layers)]
    head = sum(2 * a * b for a, b in pairwise([*widths, config.head.out_dim]))
    total = 0
    for side, student_views, teacher_views in (
        (config.crops.global_size, 2, 2),
        (config.crops.local_size, config.crops.local_number, 0),
    ):
        embed, blocks = vit_forward(model.backbone, side)
        total += student_views * (2 * embed + 3 * (blocks + head))
        total += teacher_views * (embed + blocks + head)
    return float(total)
