"""Contact sheets of attention: of one picture with a tile per head, or of several pictures.

Dims: H and W pixels of the network's input, C channels, h heads, r rows and c columns of patches.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dino_jax.visualize.attention_masks import mass_mask, to_pixels
from dino_jax.visualize.sheet import (
    PAPER,
    TILE,
    Tile,
    color_map,
    contact_sheet,
    draw_masks,
    hues,
    tile_of,
    wrapped,
)


@dataclasses.dataclass(frozen=True)
class Attended:
    """A picture and its attention maps."""

    name: str
    image: np.ndarray  # [H, W, C] uint8, the network's input
    maps: np.ndarray  # [h, r, c]
    patch_size: int  # pixels
    shape: tuple[int, int]  # height and width of the original picture


def named_maps(maps: np.ndarray) -> dict[str, np.ndarray]:
    """The mean of the maps [h, r, c] and the map of each head, by name, each [r, c]."""
    return {"mean": maps.mean(axis=0)} | {f"head {i}": x for i, x in enumerate(maps)}


def picture_sheet(attended: Attended, threshold: float | None, title: str) -> Image.Image:
    """Draws the attention maps of one picture, with the mask of each map below it.

    Args:
      attended: the picture.
      threshold: share of a map's mass that its mask holds; None for no masks.
      title: above the sheet.
    """
    tiles = [_image_tile(attended, TILE, "image"), *_map_tiles(attended, TILE)]
    if threshold is None:
        return contact_sheet(wrapped(tiles), title=title)
    share, colors = f"{100 * threshold:g} %", hues(len(attended.maps))
    masks = [_heads_tile(attended, threshold, TILE, f"{share} of every head")]
    for color, (name, values) in zip(
        [PAPER, *colors], named_maps(attended.maps).items(), strict=True
    ):
        mask = mass_mask(values, threshold)[None]
        masks.append(_mask_tile(attended, mask, [color], TILE, f"{share} of {name}"))
    pairs = zip(wrapped(tiles), wrapped(masks), strict=True)
    return contact_sheet([row for pair in pairs for row in pair], title=title)


def pictures_sheet(pictures: Sequence[Attended], threshold: float, title: str) -> Image.Image:
    """Draws a row per picture: the picture, the masks of all heads over it, and the maps."""
    side = TILE * 3 // 4
    rows = [
        [
            _image_tile(attended, side, attended.name),
            _heads_tile(attended, threshold, side, f"{100 * threshold:g} % of every head"),
            *_map_tiles(attended, side),
        ]
        for attended in pictures
    ]
    return contact_sheet(rows, title=title)


def _image_tile(attended: Attended, side: int, caption: str) -> Tile:
    return Tile(tile_of(attended.image, attended.shape, side=side, smooth=True), caption)


def _map_tiles(attended: Attended, side: int) -> list[Tile]:
    """The mean map and the map of each head, in colours."""
    tiles = []
    for caption, values in named_maps(attended.maps).items():
        pixels = color_map(to_pixels(values, attended.patch_size, attended.image.shape[:2]))
        tiles.append(Tile(tile_of(pixels, attended.shape, side=side), caption))
    return tiles


def _heads_tile(attended: Attended, threshold: float, side: int, caption: str) -> Tile:
    """The masks of all heads; overlaps go to the head with the most attention to the patch."""
    maps = attended.maps
    masks = mass_mask(maps, threshold)
    shares = np.where(masks, maps / maps.sum(axis=(1, 2), keepdims=True), 0)
    owned = masks & (shares.argmax(axis=0) == np.arange(len(maps))[:, None, None])
    return _mask_tile(attended, owned, hues(len(maps)), side, caption)


def _mask_tile(
    attended: Attended,
    masks: np.ndarray,
    colors: Sequence[tuple[int, int, int]],
    side: int,
    caption: str,
) -> Tile:
    """Draws masks [.., r, c] at the resolution of the tile, so that contours stay sharp."""
    ground = tile_of(attended.image, attended.shape, side=side, smooth=True)
    pixels = to_pixels(masks, attended.patch_size, attended.image.shape[:2])
    rows = np.arange(ground.height) * pixels.shape[1] // ground.height
    columns = np.arange(ground.width) * pixels.shape[2] // ground.width
    drawn = draw_masks(np.asarray(ground), pixels[:, rows[:, None], columns], colors)
    return Tile(Image.fromarray(drawn), caption)
