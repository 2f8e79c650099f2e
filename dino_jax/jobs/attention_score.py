"""How well attention covers what the pictures show: masks against true masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from dino_jax.data.decode import decode
from dino_jax.data.sources.opening import open_source
from dino_jax.data.sources.source import Source
from dino_jax.errors import UsageError
from dino_jax.jobs.results import table, write_results
from dino_jax.output import check_writable
from dino_jax.visualize.attention import (
    THRESHOLD,
    attention_of,
    check_threshold,
    jaccard,
    mass_mask,
    to_pixels,
)
from dino_jax.visualize.attention_sheet import named_maps
from dino_jax.visualize.pictures import SIZE, check_size, fit
from dino_jax.weights.load import load


def attention_score(
    weights: str,
    data: str,
    which: Literal["teacher", "student"] = "teacher",
    size: tuple[int, ...] = SIZE,
    threshold: float = THRESHOLD,
    output: Path = Path("results.json"),
) -> dict[str, dict[str, float]]:
    """Scores attention as a segmentation, before and after training (Jaccard, also called IoU).

    Args:
      weights: A hub name, a .pth file, a converted folder, or a run folder (its workdir).
      data: Pictures whose true masks are known: shapes:N@test.
      which: The network of a run; the teacher is the better one.
      size: Height and width in pixels to resize to; one number for the shorter side, which keeps
        the shape; 0 for images as they are.
      threshold: Share of a map's mass that its mask holds.
      output: The JSON file to write: scores, settings, weights' hash, versions.

    Returns: for the network with random weights, "untrained", and with those given: mean
      percentages of each head, of the heads' mean, and of the head that is best for each picture,
      as the paper shows it (figure 4).
    Raises:
      UsageError: something cannot be loaded, opened or written; there are no true masks.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    check_threshold(threshold)
    check_writable(output)
    source = open_source(data)
    if not hasattr(source, "mask"):
        raise UsageError(f"{data} has no true masks to compare with: give shapes:N@test")
    scores = {}
    for name in ("untrained", which):
        model, info = load(weights, which=name)
        attend = attention_of(model, info)
        check_size(size, info.patch_size)
        scores[name] = _scores(attend, source, size, info.patch_size, len(info.mean), threshold)
    rows = [[row, *(f"{scores[name][row]:.1f}" for name in scores)] for row in scores[which]]
    print(table(["Jaccard %", *scores], rows))
    write_results(output, "attention-score", scores, settings, info)
    return scores


def _scores(
    attend: Callable[[np.ndarray], np.ndarray],
    source: Source,
    size: tuple[int, ...],
    patch_size: int,
    channels: int,
    threshold: float,
) -> dict[str, float]:
    """Mean scores in percent of each map and of the best head of each picture."""
    scores = []
    for index in tqdm(range(len(source)), desc=source.spec, unit=" images"):
        image = fit(decode(source.image(index), channels=channels), size, patch_size)
        mask = source.mask(index)[..., None].astype(np.uint8)
        truth = fit(mask, size, patch_size, Image.Resampling.NEAREST)[..., 0] > 0
        maps = named_maps(attend(image))
        masks = mass_mask(np.stack(list(maps.values())), threshold)
        scores.append(jaccard(to_pixels(masks, patch_size, image.shape[:2]), truth))
    means = 100 * np.mean(scores, axis=0)
    best = 100 * np.mean([row[1:].max() for row in scores])
    return dict(zip(maps, means.tolist(), strict=True)) | {"best head": float(best)}
