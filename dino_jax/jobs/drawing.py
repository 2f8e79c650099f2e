"""What the drawing jobs share: a backbone over pictures that are resized to whole patches.

Dims: H and W pixels of the network's input, C channels.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from PIL import Image

from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import Source
from dino_jax.errors import about
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.picture_features import batch_that_fits
from dino_jax.evaluate.features.picture_pass import (
    Group,
    PictureFeature,
    PicturePass,
    picture_sizes,
)
from dino_jax.visualize.pictures import check_input_size, fit_to_patches, patch_grid_shape

# However many pictures are unreadable, the others are drawn.
OPTIONS = PassOptions(batch_size=8, max_unreadable=1.0)


def records_of(backbone: PlacedBackbone, source: Source) -> Records:
    """The pictures of a source, as the backbone takes them."""
    channels = len(backbone.info.mean)
    return Records(
        source,
        max_unreadable=backbone.options.max_unreadable,
        max_pixels=backbone.options.max_pixels,
        channels=channels,
    )


def over_pictures(
    backbone: PlacedBackbone, feature: PictureFeature, records: Records, size: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Computes a feature of pictures; those of one size share batches.

    Args:
      backbone: computes the feature, on all devices.
      feature: maps [B, H, W, C] uint8 of whole patches to rows.
      records: the pictures.
      size: as in `visualize.pictures.resized_shape`.
    Returns: iterator of (index, row) of every readable picture, the largest pictures first.
    Raises:
      UsageError: the size is out of range, a picture is too large for the memory, no picture can
        be read, or a feature is not finite; where possible before anything is computed.
    """
    patch_size, options = backbone.info.patch_size, backbone.options
    check_input_size(size, patch_size)
    members = defaultdict(list)
    if len(size) == 2:
        members[patch_grid_shape(tuple(size), size, patch_size)].extend(range(len(records)))
    else:
        for index, shape in picture_sizes(records, options.num_threads).items():
            members[patch_grid_shape(shape, size, patch_size)].append(index)
    groups = []
    for shape in sorted(members, key=np.prod, reverse=True):
        with about(records.source.name(members[shape][0])):
            batch_size = batch_that_fits(shape, backbone.model, backbone.mesh, options.batch_size)
        groups.append((feature, Group(members[shape], shape, batch_size)))
    load = partial(_load, channels=records.channels, size=size, patch_size=patch_size)
    for part in PicturePass(backbone).parts(records, load, groups):
        yield from zip(part.index.tolist(), part.features, strict=True)


def unread(source: Source, read: Sequence[int]) -> list[str]:
    """Names of the pictures of a source that were skipped because they are unreadable."""
    return [source.name(i) for i in sorted(set(range(len(source))) - set(read))]


def _load(image: Image.Image, *, channels: int, size: Sequence[int], patch_size: int) -> np.ndarray:
    return fit_to_patches(decode(image, channels=channels), size, patch_size)
