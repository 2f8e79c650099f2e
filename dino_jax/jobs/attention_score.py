"""The attention-score job: attention masks compared with true masks."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from tyro.conf import arg

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.score import region_overlap
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.picture_features import AttentionMaps, check_attention
from dino_jax.jobs.drawing import OPTIONS, over_pictures, records_of
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths
from dino_jax.visualize.attention_masks import THRESHOLD, check_threshold, mass_mask, to_pixels
from dino_jax.visualize.attention_sheet import named_maps
from dino_jax.visualize.pictures import SIZE, fit_to_patches


@local_paths
def attention_score(
    weights: str,
    data: str,
    size: tuple[int, ...] = SIZE,
    threshold: float = THRESHOLD,
    output: Path = Path("results.json"),
    options: Annotated[PassOptions, arg(name="")] = OPTIONS,
) -> dict[str, dict[str, float]]:
    """Scores attention as a segmentation, before and after training (Jaccard index, or IoU).

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      data: Pictures with true masks: shapes:N@test.
      size: Height and width in pixels to resize to; one number for the shorter side, which keeps
        the aspect ratio; 0 to keep the size of the images.
      threshold: Share of a map's mass that its mask holds.
      output: The JSON file to write: scores, settings, the weights' hash, versions.
      options: How the backbone processes the pictures.

    Returns: for the network with random weights ("untrained") and for the given one: mean
      percentages of each head, of the heads' mean, and of the best head of each picture, as in
      the paper (figure 4).
    Raises:
      UsageError: something cannot be loaded, opened or written, or there are no true masks.
    """
    check_threshold(threshold)
    check_writable(output)
    source = open_source(data)
    if not hasattr(source, "mask"):
        raise UsageError(f"{data} has no true masks to compare with: use shapes:N@test")
    scores = {}
    for which in ("untrained", options.which):
        backbone = PlacedBackbone(weights, options, which)
        check_attention(backbone.model, backbone.info.source)
        scores[which] = _scores(backbone, source, size, threshold)
    settings = {"weights": weights, "data": data, "size": size, "threshold": threshold}
    report(
        output,
        "attention-score",
        scores,
        settings | dataclasses.asdict(options),
        backbone.info,
        header=["Jaccard %", *scores],
        rows=[
            [name, *(f"{score[name]:.1f}" for score in scores.values())]
            for name in scores[options.which]
        ],
    )
    return scores


def _scores(
    backbone: PlacedBackbone, source: Source, size: tuple[int, ...], threshold: float
) -> dict[str, float]:
    """Mean scores in percent: of each map, and of the best head of each picture."""
    info, records = backbone.info, records_of(backbone, source)
    scores = {}
    for index, maps in over_pictures(backbone, AttentionMaps(info.mean, info.std), records, size):
        mask = source.mask(index)[..., None].astype(np.uint8)
        truth = fit_to_patches(mask, size, info.patch_size, Image.Resampling.NEAREST)[..., 0] > 0
        named = named_maps(maps)
        masks = mass_mask(np.stack(list(named.values())), threshold)
        masks = to_pixels(masks, info.patch_size, truth.shape)
        scores[index] = [region_overlap(mask, truth) for mask in masks]
    table = np.array([scores[index] for index in sorted(scores)])  # a row for each picture
    means = 100 * table.mean(axis=0)
    best = 100 * table[:, 1:].max(axis=1).mean()
    return dict(zip(named, means.tolist(), strict=True)) | {"best head": float(best)}
