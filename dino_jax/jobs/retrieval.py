"""The retrieval job: Revisited Oxford and Paris."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import arg

from dino_jax.data.decode import fit, fitted_size
from dino_jax.data.pipeline import Records
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.picture_pass import PicturePass, in_place, picture_sizes
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.evaluate.retrieval.ranking import KS, PROTOCOLS, rank, score_ranking
from dino_jax.evaluate.retrieval.revisited import open_revisited
from dino_jax.evaluate.retrieval.scales import SCALES, group_by_shape
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths

PRESETS: dict[str, dict[str, Any]] = {  # paper, table 3
    "paper-oxford": {"image_size": 224, "multiscale": False},
    "paper-paris": {"image_size": 512, "multiscale": True},
}


@local_paths
def retrieval(
    weights: str,
    data: Path,
    preset: Literal["paper-oxford", "paper-paris"] | None = None,
    image_size: int | None = None,
    multiscale: bool | None = None,
    output: Path = Path("results.json"),
    options: Annotated[PassOptions, arg(name="")] = PassOptions(),
    cache: Annotated[FeatureCache, arg(name="")] = FeatureCache(),
) -> dict[str, dict[str, float | None]]:
    """Retrieves pictures of the same landmark on Revisited Oxford (ROxford5k) or Paris (RParis6k).

    Queries are whole pictures, as in the reference, not cropped to their boxes.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      data: Folder of the data set, such as roxford5k, with gnd_roxford5k.pkl and jpg.
      preset: paper-oxford (224 pixels, one scale) or paper-paris (512 pixels, three scales);
        default: chosen by the data set.
      image_size: Pictures are shrunk to fit a square of this many pixels; default: the preset's.
      multiscale: Average the features of scales 1, 0.71 and 0.5; default: the preset's.
      output: The JSON file to write: scores, settings, the weights' hash, versions.
      options: How the backbone processes the pictures.
      cache: Where features are stored.

    Returns: for each protocol (easy, medium, hard) "map" and "mp_at_1", "mp_at_5", "mp_at_10" in
      percent, None if no query has a positive.
    Raises:
      UsageError: something cannot be loaded, read or written, or a setting is out of range.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size={image_size} must be at least 1")
    check_writable(output)
    dataset = open_revisited(data)
    if preset is None:
        preset = "paper-paris" if (data / "gnd_rparis6k.pkl").is_file() else "paper-oxford"
    chosen = dict(PRESETS[preset])
    chosen |= {} if image_size is None else {"image_size": image_size}
    chosen |= {} if multiscale is None else {"multiscale": multiscale}
    backbone = PlacedBackbone(weights, options)
    records = Records(
        dataset.pictures,
        max_unreadable=options.max_unreadable,
        max_pixels=options.max_pixels,
        channels=len(backbone.info.mean),
    )
    transform = chosen | {"mean": backbone.info.mean, "std": backbone.info.std}
    (found,) = cache.features(
        [dataset.pictures],
        lambda source: backbone.about(source, "AtScales", transform),
        lambda _: _features(backbone, records, **chosen),
    )
    rows, readable = in_place(found, len(records))
    truth = dataset.truth_among(readable)
    ranks = rank(rows[: dataset.num_images], rows[dataset.num_images :])
    scores = {}
    for protocol in PROTOCOLS:
        found = score_ranking(ranks, truth, protocol)
        measures = {"map": found.mean_average_precision} | {
            f"mp_at_{k}": precision for k, precision in found.mean_precision.items()
        }
        scores[protocol] = {
            name: None if np.isnan(value) else 100 * value for name, value in measures.items()
        }
    unreadable = [dataset.pictures.name(i) for i in np.flatnonzero(~readable)]
    settings = {"weights": weights, "data": data, "preset": preset} | chosen
    report(
        output,
        "retrieval",
        {"retrieval": scores, "unreadable_images": unreadable},
        settings | dataclasses.asdict(options) | dataclasses.asdict(cache),
        backbone.info,
        header=["protocol", "mAP %", *(f"mP@{k} %" for k in KS)],
        rows=[
            [protocol, *("-" if value is None else f"{value:.2f}" for value in row.values())]
            for protocol, row in scores.items()
        ],
        unreadable={dataset.pictures.spec: len(unreadable)},
    )
    return scores


def _features(
    backbone: PlacedBackbone, records: Records, *, image_size: int, multiscale: bool
) -> Features:
    """Features [N, D] of all readable pictures."""
    scales = SCALES if multiscale else (1.0,)
    info = backbone.info
    patch_size = info.patch_size if getattr(backbone.model, "family", None) == "vit" else None

    sizes = {
        i: fitted_size((width, height), image_size)
        for i, (height, width) in picture_sizes(records, backbone.options.num_threads).items()
    }
    for i, size in sizes.items():
        smallest = min(scales) * min(size)
        if patch_size is not None and smallest < patch_size:
            raise UsageError(
                f"{records.source.name(i)} is {size[1]}x{size[0]} pixels at "
                f"image_size={image_size}, and {smallest:.0f} at the smallest scale, less than one "
                f"patch of {patch_size}: raise image_size, or use a single scale"
            )
    groups = group_by_shape(sizes, scales, patch_size, info.mean, info.std)
    load = partial(fit, side=image_size, channels=records.channels)
    return PicturePass(backbone).features(records, load, groups.items())
