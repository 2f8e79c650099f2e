"""Drawing: colour maps, masks over pictures, and contact sheets of tiles with captions.

Dims: `H, W` pixels, `h` masks.
"""

import colorsys
import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dino_jax.text import printable

TILE = 224  # pixels of a tile's longer side
COLUMNS = 8  # maximum per row
MARGIN, GAP = 24, 12  # pixels around a sheet and between tiles
CAPTION, TITLE = 15, 20  # font sizes in pixels
WORDS = 10 * CAPTION  # minimum width of long captions, in pixels
PAPER, INK = (255, 255, 255), (40, 40, 45)

Color = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture on a contact sheet."""

    picture: Image.Image
    caption: str = ""
    frame: Color | None = None


def color_map(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Maps numbers to colours, from black over red to light yellow.

    Args:
      values: [H, W].
      limits: numbers of the first and the last colour; default: the minimum and the 99.5th
        percentile, so that outliers do not reduce the contrast.
    Returns: [H, W, 3] uint8.
    """
    from matplotlib import colormaps  # imported here, as it is slow

    low, high = limits or (values.min(), np.quantile(values, 0.995))
    return colormaps["inferno"]((values - low) / max(high - low, 1e-12), bytes=True)[..., :3]


def hues(count: int) -> list[Color]:
    """Bright colours with evenly spaced hues."""
    rgb = (colorsys.hsv_to_rgb(0.04 + i / count, 0.75, 1.0) for i in range(count))
    return [tuple(round(255 * x) for x in color) for color in rgb]


def draw_masks(picture: np.ndarray, masks: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """Draws coloured masks with contours over a picture.

    Args:
      picture: [H, W, C] uint8, grey or RGB.
      masks: [h, H, W] bool; overlaps get the mean colour.
      colors: one for each mask.
    Returns: [H, W, 3] uint8.
    """
    drawn = as_rgb(picture).astype(np.float32)
    palette = np.array(colors, np.float32)
    covered = masks.any(axis=0)
    mixed = np.tensordot(masks, palette, axes=(0, 0)) / np.maximum(masks.sum(axis=0), 1)[..., None]
    drawn[covered] = 0.55 * drawn[covered] + 0.45 * mixed[covered]
    drawn[~covered] *= 0.6
    width = 2 * (max(picture.shape[:2]) // 300) + 3  # pixels of the filter, odd
    for mask, color in zip(masks, palette, strict=True):
        inside = Image.fromarray(mask).convert("L").filter(ImageFilter.MinFilter(width))
        drawn[mask & (np.asarray(inside) == 0)] = color
    return drawn.round().astype(np.uint8)


def tile_of(
    pixels: np.ndarray, shape: tuple[int, int], *, side: int = TILE, smooth: bool = False
) -> Image.Image:
    """Resizes pixels to a tile with a given aspect ratio.

    Args:
      pixels: [H, W, C] uint8, grey or RGB.
      shape: height and width in this ratio.
      side: pixels of the longer side.
      smooth: interpolate; otherwise each pixel stays a sharp block.
    """
    height, width = (max(1, round(side * length / max(shape))) for length in shape)
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(as_rgb(pixels)).resize((width, height), way)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C] uint8, grey or RGB -> [H, W, 3]."""
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def wrapped(tiles: Sequence[Tile], columns: int = COLUMNS) -> list[list[Tile]]:
    """Splits tiles into rows of similar length, at most `columns`."""
    rows = -(-len(tiles) // columns)
    length = -(-len(tiles) // rows)
    return [list(tiles[i : i + length]) for i in range(0, len(tiles), length)]


def contact_sheet(rows: Sequence[Sequence[Tile]], *, title: str = "") -> Image.Image:
    """Draws tiles in rows and columns on white, with their captions below.

    Args:
      rows: of tiles, of any lengths.
      title: a line above the tiles.
    """
    columns = max(map(len, rows))
    widths = [max(_width(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    heights = [max(tile.picture.height for tile in row) for row in rows]
    lines = [CAPTION + 12 if any(tile.caption for tile in row) else 0 for row in rows]
    top = MARGIN + (TITLE + 2 * GAP if title else 0)
    width = 2 * MARGIN + sum(widths) + GAP * (columns - 1)
    height = top + sum(heights) + sum(lines) + GAP * (len(rows) - 1) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), _cut(title, TITLE, width - 2 * MARGIN), INK, _font(TITLE))
    y = top
    for row, height, line in zip(rows, heights, lines, strict=True):
        x = MARGIN
        for tile, column in zip(row, widths, strict=False):
            left = x + (column - tile.picture.width) // 2
            upper = y + (height - tile.picture.height) // 2
            sheet.paste(tile.picture, (left, upper))
            if tile.frame:
                right, lower = left + tile.picture.width, upper + tile.picture.height
                draw.rectangle((left - 4, upper - 4, right + 3, lower + 3), None, tile.frame, 4)
            text = _cut(tile.caption, CAPTION, column)
            draw.text((x + column / 2, y + height + 6), text, INK, _font(CAPTION), anchor="ma")
            x += column + GAP
        y += height + line + GAP
    return sheet


def _width(tile: Tile) -> int:
    words = math.ceil(_font(CAPTION).getlength(printable(tile.caption)))
    return max(tile.picture.width, min(words, WORDS))


def _cut(text: str, size: int, width: float) -> str:
    """The text, truncated with an ellipsis to a width in pixels."""
    text = printable(text)
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # for its font, which covers most alphabets

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
