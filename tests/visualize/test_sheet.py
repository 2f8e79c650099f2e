"""Drawing sheets of pictures, compared pixel by pixel where possible."""

import numpy as np
import pytest
from PIL import Image

from dino_jax.visualize import sheet
from dino_jax.visualize.sheet import Tile


def test_color_map_spans_the_limits() -> None:
    values = np.linspace(0, 1, 1000)[None]
    colors = sheet.color_map(values)
    brightness = colors.astype(int).sum(axis=-1)[0]
    assert colors.dtype == np.uint8
    assert brightness[0] < 10
    assert (np.diff(brightness) >= 0).mean() > 0.98
    assert (colors[0, -5:] == colors[0, -1]).all()  # the last half percent
    np.testing.assert_array_equal(sheet.color_map(values, (2.0, 3.0))[0, 0], colors[0, 0])
    assert (sheet.color_map(np.ones((2, 2))) == colors[0, 0]).all()  # no division by zero


def test_masks_are_filled_and_have_contours() -> None:
    picture = np.full((40, 40, 1), 100, np.uint8)
    masks = np.zeros((2, 40, 40), bool)
    masks[0, 10:30, 10:30] = True
    masks[1, 20:36, 20:36] = True
    red, blue = (250, 0, 0), (0, 0, 250)
    drawn = sheet.draw_masks(picture, masks, [red, blue])
    assert drawn.shape == (40, 40, 3)
    assert tuple(drawn[2, 2]) == (60, 60, 60)  # outside: darker
    assert tuple(drawn[10, 15]) == red
    assert tuple(drawn[35, 30]) == blue
    assert tuple(drawn[15, 15]) == (168, 55, 55)  # 55 % picture, 45 % colour
    assert tuple(drawn[25, 25]) == (111, 55, 111)  # both colours
    assert (picture == 100).all()


@pytest.mark.parametrize("count", [1, 3, 6, 16])
def test_hues_differ(count: int) -> None:
    colors = np.array(sheet.hues(count), int)
    distance = np.abs(colors[:, None] - colors).sum(axis=-1)
    assert distance[~np.eye(count, dtype=bool)].min(initial=255) > 40


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (8, [8]), (9, [5, 4]), (14, [7, 7]), (17, [6, 6, 5])]
)
def test_rows_have_similar_lengths(count: int, lengths: list[int]) -> None:
    tiles = [Tile(Image.new("RGB", (9, 9)), str(i)) for i in range(count)]
    rows = sheet.wrapped(tiles)
    assert [len(row) for row in rows] == lengths
    assert [tile.caption for row in rows for tile in row] == [str(i) for i in range(count)]


def test_tiles_are_aligned_in_columns() -> None:
    def tile(width: int, height: int, color: tuple[int, int, int]) -> Tile:
        return Tile(Image.new("RGB", (width, height), color))

    red, blue, green = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    drawn = sheet.contact_sheet([[tile(30, 20, red), tile(50, 10, blue)], [tile(10, 40, green)]])
    margin, gap = sheet.MARGIN, sheet.GAP
    assert drawn.size == (2 * margin + 30 + gap + 50, 2 * margin + 20 + gap + 40)
    pixels = np.asarray(drawn)
    for color, (top, left), (height, width) in (
        (red, (margin, margin), (20, 30)),
        (blue, (margin + 5, margin + 30 + gap), (10, 50)),  # vertically centered
        (green, (margin + 20 + gap, margin + 10), (40, 10)),  # horizontally centered
    ):
        place = (pixels == color).all(axis=-1)
        assert place.sum() == height * width
        assert place[top : top + height, left : left + width].all()


def test_captions_are_aligned_and_not_cut_on_narrow_tiles() -> None:
    def inked(height: int, caption: str) -> np.ndarray:
        tiles = [Tile(Image.new("RGB", (50, x), sheet.PAPER), caption) for x in (height, 90)]
        return np.asarray(sheet.contact_sheet([tiles]))

    np.testing.assert_array_equal(inked(20, "60 % of every head"), inked(90, "60 % of every head"))
    assert sheet._cut("60 % of every head", sheet.CAPTION, sheet.WORDS) == "60 % of every head"
    assert inked(90, "").shape[1] < inked(90, "60 % of every head").shape[1]


def test_captions_title_and_frames_are_within_the_sheet() -> None:
    tile = Tile(Image.new("RGB", (60, 40), (0, 0, 0)), "a caption of many letters", (0, 200, 0))
    plain = sheet.contact_sheet([[Tile(tile.picture)]])
    drawn = sheet.contact_sheet([[tile]], title="Überschrift, länger als das Blatt breit ist")
    assert drawn.width == plain.width - 60 + sheet.WORDS  # WORDS is the minimum width for text
    assert drawn.height == plain.height + sheet.TITLE + 2 * sheet.GAP + sheet.CAPTION + 12
    pixels = np.asarray(drawn)
    edge = np.concatenate([pixels[:, :4], pixels[:, -4:]], axis=1)
    assert (edge == 255).all()  # the text is cut
    assert (pixels == (0, 200, 0)).all(axis=-1).sum() == 68 * 48 - 60 * 40


def test_tile_keeps_the_shape_of_the_picture() -> None:
    pixels = np.zeros((48, 48, 1), np.uint8)
    assert sheet.tile_of(pixels, (300, 400)).size == (sheet.TILE, sheet.TILE * 3 // 4)
    assert sheet.tile_of(pixels, (1, 4000), side=100).size == (100, 1)
    blocks = np.zeros((2, 2, 3), np.uint8)
    blocks[0, 0] = 255
    assert set(np.unique(sheet.tile_of(blocks, (2, 2)))) == {0, 255}
    assert len(np.unique(sheet.tile_of(blocks, (2, 2), smooth=True))) > 10
