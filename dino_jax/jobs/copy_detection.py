"""The copy-detection job: Copydays."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from dino_jax.data.decode import squash
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.cache import FeatureCache
from dino_jax.evaluate.features.picture_pass import Group, PicturePass, in_place
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.evaluate.retrieval.copy_detection import RESULTS, CopyDescriptor, score_subsets
from dino_jax.evaluate.retrieval.copydays import open_copydays
from dino_jax.evaluate.retrieval.whitening import learn_whitening
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths


@local_paths
def copy_detection(
    weights: str,
    data: Path,
    image_size: int = 320,
    distractors: str | None = None,
    whitening: str | None = None,
    output: Path = Path("results.json"),
    options: Annotated[PassOptions, arg(name="")] = PassOptions(batch_size=16),
    cache: Annotated[FeatureCache, arg(name="")] = FeatureCache(),
) -> dict[str, dict[str, float | int | None]]:
    """Retrieves the originals of manipulated copies on Copydays: the strong and all other subsets.

    The descriptor of a picture is its class token and the GeM mean (power 4) of its patch tokens.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      data: Folder of Copydays, with original, strong, and jpegqual and crops.
      image_size: Pictures are resized to a square of this many pixels.
      distractors: Images added to the originals (the paper: 10,000 of YFCC100M), as
        KIND:LOCATION[@SPLIT].
      whitening: Other images to learn a PCA whitening from (the paper: 20,000 of YFCC100M).
      output: The JSON file to write: scores, settings, the weights' hash, versions.
      options: How the backbone processes the pictures.
      cache: Where descriptors are stored.

    Returns: for each subset "map", the mean average precision in percent, and "queries", their
      number; "map" is None if there are no queries.
    Raises:
      UsageError: something cannot be loaded, read or written, a setting is out of range, or the
        network has no patch tokens.
    """
    if image_size < 1:
        raise UsageError(f"image_size={image_size} must be at least 1")
    check_writable(output)
    copydays = open_copydays(data)
    others = {
        name: open_source(spec)
        for name, spec in (("distractors", distractors), ("whitening", whitening))
        if spec is not None
    }
    backbone = PlacedBackbone(weights, options)
    passes, mean, std = PicturePass(backbone), backbone.info.mean, backbone.info.std
    descriptor, canvas = CopyDescriptor(mean, std), (image_size, image_size)
    passes.check(descriptor, canvas)
    load = partial(squash, side=image_size, channels=len(mean))

    def described(source: Source) -> Features:
        records = Records(
            source,
            max_unreadable=options.max_unreadable,
            max_pixels=options.max_pixels,
            channels=len(mean),
        )
        return passes.features(records, load, [(descriptor, Group(range(len(source)), canvas))])

    sources = [copydays.files, *others.values()]
    transform = {"image_size": image_size}
    found = cache.features(
        sources, lambda source: backbone.about(source, repr(descriptor), transform), described
    )
    unreadable = {
        source.spec: [source.name(i) for i in np.delete(np.arange(len(source)), part.index)]
        for source, part in zip(sources, found, strict=True)
    }
    rows, readable = in_place(found[0], len(copydays.files))
    used = {name: part.features for name, part in zip(others, found[1:], strict=True)}
    more = used.get("distractors", rows[:0])
    if "whitening" in used:
        learned = learn_whitening(used["whitening"])
        rows, more = learned.apply(rows), learned.apply(more)
    scores = score_subsets(copydays, rows, readable, more)
    counts = {name: len(used.get(name, [])) for name in ("distractors", "whitening")}
    metrics = {
        "copy_detection": scores,
        "images_of_distractors": counts["distractors"],
        "images_of_whitening": counts["whitening"],
        "unreadable_images": [name for names in unreadable.values() for name in names],
    }
    settings = {"weights": weights, "data": data, "image_size": image_size}
    settings |= {"distractors": distractors, "whitening": whitening, "results": RESULTS}
    report(
        output,
        "copy-detection",
        metrics,
        settings | dataclasses.asdict(options) | dataclasses.asdict(cache),
        backbone.info,
        header=["subset", "queries", "mAP %"],
        rows=[
            [name, row["queries"], "-" if row["map"] is None else f"{row['map']:.2f}"]
            for name, row in scores.items()
        ],
        notes=[_conditions(**counts)],
        unreadable={spec: len(names) for spec, names in unreadable.items()},
    )
    return scores


def _conditions(distractors: int, whitening: int) -> str:
    """The conditions that belong to a score."""
    learned = f"whitening learned on {whitening} images" if whitening else "no whitening"
    return f"with {distractors or 'no'} distractors and {learned}; in the paper 10000 and 20000"
