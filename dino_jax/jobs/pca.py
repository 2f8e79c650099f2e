"""The pca job: patch tokens of pictures as colours."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm

from dino_jax.data.transforms.color import normalize
from dino_jax.errors import UsageError, about
from dino_jax.jobs.results import write_results
from dino_jax.models.network import split
from dino_jax.output import check_writable
from dino_jax.visualize.pca import is_foreground, principal_components, to_colors
from dino_jax.visualize.pictures import (
    SIZE,
    Pictures,
    check_finite,
    check_memory,
    check_size,
    fit,
    open_pictures,
)
from dino_jax.visualize.sheet import Tile, contact_sheet, tile_of
from dino_jax.weights.load import load

ROWS = 16  # pictures on the contact sheet


def pca(
    weights: str,
    image: tuple[str, ...],
    output: Path,
    which: Literal["teacher", "student"] = "teacher",
    size: tuple[int, ...] = SIZE,
) -> list[Path]:
    """Draws the first three principal components of patch tokens as red, green and blue.

    The components are shared by all pictures, so equal colours mean like content. The first one
    splits foreground from background; then the foreground's tokens get components of their own.

    Args:
      weights: A hub name, a .pth file, a converted folder, or a run folder (its workdir); a ViT.
      image: Image files, folders or other sources, as many as you like.
      output: The folder to write to: pca.png, a contact sheet of the first 16 pictures, and for
        every picture NAME-pca.png and NAME-foreground.png.
      which: The network of a run; the teacher is the better one.
      size: Height and width in pixels to resize to; one number for the shorter side, which keeps
        the shape; 0 for images as they are.

    Returns: the pictures written, the contact sheet first.
    Raises:
      UsageError: something cannot be loaded, opened or written; the network has no patch tokens, or
        none that are finite.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    check_writable(output / "results.json")
    sources = open_pictures(image)
    model, info = load(weights, which=which)
    if not hasattr(model, "get_intermediate_layers"):
        raise UsageError(f"{weights} is of type {type(model).__name__}: patch tokens need a ViT")
    check_size(size, info.patch_size)
    pictures = Pictures(sources, channels=len(info.mean))
    graphdef, *arrays = split(model)
    patch_tokens = jax.jit(partial(_patch_tokens, graphdef, mean=info.mean, std=info.std))
    shown, tokens, borders = {}, [], []
    for name, pixels in tqdm(pictures, desc="tokens", unit=" images"):
        fitted = fit(pixels, size, info.patch_size)
        with about(name):
            check_memory(fitted, model)
            tokens.append(jax.device_get(patch_tokens(arrays, fitted)))
            check_finite(tokens[-1], f"the patch tokens of {info.source}")
        grid = tuple(side // info.patch_size for side in fitted.shape[:2])
        shown[name] = grid, fitted.shape[:2], tile_of(fitted, pixels.shape[:2], smooth=True)
        border = np.ones(grid, bool)
        border[1:-1, 1:-1] = False
        borders.append(border.ravel())

    ends = np.cumsum([len(part) for part in tokens])[:-1]
    colorings = _colorings(np.concatenate(tokens), np.concatenate(borders))
    parts = (np.split(colors, ends) for colors in colorings)
    sheet, written = [], [output / "pca.png"]
    for (name, (grid, shape, tile)), *colored in zip(shown.items(), *parts, strict=True):
        row = [Tile(tile, name)]
        for caption, colors in zip(("pca", "foreground"), colored, strict=True):
            picture = Image.fromarray(colors.reshape(*grid, 3))
            written.append(output / f"{name}-{caption}.png")
            picture.resize(shape[::-1], Image.Resampling.NEAREST).save(written[-1])
            row.append(Tile(picture.resize(tile.size, Image.Resampling.NEAREST), caption))
        sheet.append(row)
    contact_sheet(sheet[:ROWS], title=f"principal components of {info.source}").save(written[0])
    print(f"{written[0]} shows {len(sheet[:ROWS])} of {len(sheet)} pictures")
    if pictures.unreadable:
        print(f"images that cannot be read and were left out: {len(pictures.unreadable)}")
    metrics = {"images": len(sheet), "unreadable_images": pictures.unreadable}
    write_results(output / "results.json", "pca", metrics, settings, info)
    return written


def _patch_tokens(
    graphdef: nnx.GraphDef,
    arrays: list[Any],
    image: jax.Array,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.Array:
    """[H, W, C] uint8 -> [r * c, D], of the last block."""
    pixels = normalize(jnp.moveaxis(image[None], -1, -3), mean, std)
    with jax.default_matmul_precision("highest"):  # as `features.feature_function`
        return nnx.merge(graphdef, *arrays).get_intermediate_layers(pixels)[0][0, 1:]


def _colorings(tokens: np.ndarray, on_border: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours [N, 3] of all tokens [N, D], and those of the foreground before black."""
    components = principal_components(tokens, 3)
    foreground = is_foreground(components[:, 0], on_border)
    own = np.zeros((len(tokens), 3), np.uint8)
    own[foreground] = to_colors(principal_components(tokens[foreground], 3))
    return to_colors(components), own
