"""How many floating-point operations does a training step need? Prints one JSON line.

python benchmarks/flops.py --config=configs/vit_small.py

`gflop_per_image` counts the matrix products of a ViT and its head by their shapes, without crops;
null for other architectures. Dims: N tokens, D width, M hidden width of the MLP, K prototypes.
"""

from itertools import pairwise

from config_flag import describe, load, parser
from machine import report
from ml_collections import ConfigDict
from our_step import abstract_model

from dino_jax.models import VisionTransformer


def vit_forward(backbone: VisionTransformer, side: int) -> tuple[int, int]:
    """FLOPs of the patch embedding and of the blocks for one square image.

    A product [a, b] x [b, c] counts 2abc. Norms, softmax, GELU and resizing the position table
    (a few percent together) do not count. The last block runs for the class token alone.

    Args:
      backbone: read for its sizes; may be abstract.
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
    """FLOPs of a step per image of the batch, without making crops; None if the model is no ViT.

    A backward pass costs twice its forward pass, less the gradient of the images. Recomputation
    by remat does not count, because the algorithm does not need it.
    """
    model = abstract_model(config)
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


def main() -> None:
    flags, overrides = parser(__doc__).parse_known_args()
    config = load(flags, overrides)
    flops = flops_per_image(config)
    result = {"gflop_per_image": flops and round(flops / 1e9, 4)}
    report("flops", result | describe(flags, config))


if __name__ == "__main__":
    main()
