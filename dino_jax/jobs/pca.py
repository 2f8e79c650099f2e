"""The pca job: patch tokens of pictures as colours."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image
from tyro.conf import arg

from dino_jax.data.sources.folder import check_apart
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.picture_features import PatchTokens
from dino_jax.evaluate.features.picture_pass import PicturePass
from dino_jax.jobs.drawing import OPTIONS, over_pictures, records_of, unread
from dino_jax.jobs.results import report
from dino_jax.output import check_writable
from dino_jax.paths import local_paths
from dino_jax.visualize.pca import is_foreground, principal_components, to_colors
from dino_jax.visualize.pictures import SIZE, fit_to_patches, open_pictures, read_pixels
from dino_jax.visualize.sheet import Tile, contact_sheet, tile_of

ROWS = 16  # pictures on the contact sheet


@local_paths
def pca(
    weights: str,
    image: tuple[str, ...],
    output: Path,
    size: tuple[int, ...] = SIZE,
    options: Annotated[PassOptions, arg(name="")] = OPTIONS,
) -> list[Path]:
    """Draws the first three principal components of patch tokens as red, green and blue.

    All pictures share the components, so equal colours mean similar content. The first component
    separates foreground and background; then components of the foreground alone are drawn.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP; a ViT.
      image: Image files, folders or other sources, any number of them.
      output: Output folder: pca.png, a contact sheet of the first 16 pictures, and NAME-pca.png and
        NAME-foreground.png for every picture.
      size: Height and width in pixels to resize to; one number for the shorter side, which keeps
        the aspect ratio; 0 to keep the size of the images.
      options: How the backbone processes the pictures.

    Returns: the files written, the contact sheet first.
    Raises:
      UsageError: something cannot be loaded, opened or written, or the network has no patch tokens.
    """
    check_writable(output / "results.json")
    source = open_pictures(image)
    check_apart(source, output, "output")
    backbone = PlacedBackbone(weights, options)
    info = backbone.info
    feature = PatchTokens(info.mean, info.std)
    side = info.patch_size or 32  # of a picture that every network takes
    PicturePass(backbone).check(feature, (side, side))
    records, names = records_of(backbone, source), source.stems()
    found = dict(over_pictures(backbone, feature, records, size))
    skipped = unread(source, list(found))
    written = [output / "pca.png"]
    tokens = {names[index]: found[index] for index in sorted(found)}  # each [r, c, D]
    parts = ("pca", "foreground")
    written += [output / f"{name}-{part}.png" for name in tokens for part in parts]
    if jax.process_index() > 0:
        return written
    drawn = _colored(tokens)
    for name, pictures in drawn.items():
        height, width = (side * info.patch_size for side in tokens[name].shape[:2])
        for part, picture in zip(parts, pictures, strict=True):
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            large.save(output / f"{name}-{part}.png")
    sheet = []
    for index, (name, pictures) in zip(sorted(found), list(drawn.items())[:ROWS], strict=False):
        if (pixels := read_pixels(records, index)) is None:
            continue
        fitted = fit_to_patches(pixels, size, info.patch_size)
        tile = tile_of(fitted, pixels.shape[:2], smooth=True)
        small = [picture.resize(tile.size, Image.Resampling.NEAREST) for picture in pictures]
        sheet.append([Tile(tile, name), *map(Tile, small, parts)])
    contact_sheet(sheet, title=f"principal components of {info.source}").save(written[0])
    report(
        output / "results.json",
        "pca",
        {"images": len(found), "unreadable_images": skipped},
        {"weights": weights, "image": image, "size": size} | dataclasses.asdict(options),
        info,
        notes=[f"{written[0]} shows {len(sheet)} of {len(found)} pictures"],
        unreadable={source.spec: len(skipped)},
    )
    return written


def _colored(tokens: dict[str, np.ndarray]) -> dict[str, tuple[Image.Image, Image.Image]]:
    """For tokens [r, c, D] of each picture: all of them in colours, and the foreground on black."""
    borders = []
    for grid in tokens.values():
        border = np.ones(grid.shape[:2], bool)
        border[1:-1, 1:-1] = False
        borders.append(border.ravel())
    rows = [grid.reshape(-1, grid.shape[-1]) for grid in tokens.values()]
    ends = np.cumsum([len(part) for part in rows])[:-1]
    colorings = _colorings(np.concatenate(rows), np.concatenate(borders))
    parts = zip(*(np.split(colors, ends) for colors in colorings), strict=True)
    return {
        name: tuple(Image.fromarray(x.reshape(*grid.shape[:2], 3)) for x in part)
        for (name, grid), part in zip(tokens.items(), parts, strict=True)
    }


def _colorings(tokens: np.ndarray, on_border: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours [N, 3] of all tokens [N, D], and of the foreground alone on black."""
    components = principal_components(tokens, 3)
    foreground = is_foreground(components[:, 0], on_border)
    own = np.zeros((len(tokens), 3), np.uint8)
    own[foreground] = to_colors(principal_components(tokens[foreground], 3))
    return to_colors(components), own
