"""The attention job: from weights and pictures to maps, masks and a contact sheet of each."""

from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

from dino_jax.errors import about
from dino_jax.jobs.results import write_results
from dino_jax.output import check_writable, remove_earlier
from dino_jax.visualize.attention import (
    THRESHOLD,
    attention_of,
    check_threshold,
    mass_mask,
    to_pixels,
)
from dino_jax.visualize.attention_sheet import Attended, named_maps, picture_sheet
from dino_jax.visualize.pictures import SIZE, Pictures, check_size, fit, open_pictures
from dino_jax.visualize.sheet import PAPER, as_rgb, color_map, draw_masks, hues
from dino_jax.weights.load import load


def attention(
    weights: str,
    image: tuple[str, ...],
    output: Path,
    which: Literal["teacher", "student"] = "teacher",
    size: tuple[int, ...] = SIZE,
    threshold: float | None = THRESHOLD,
) -> list[Path]:
    """Draws where the class token of the last block looks, in every head.

    Args:
      weights: A hub name, a .pth file, a converted folder, or a run folder (its workdir).
      image: Image files, folders or other sources, as many as you like.
      output: The folder to write to: NAME-attention.png, the contact sheet of each picture, and in
        a folder NAME-attention the network's input, all maps and their masks over it.
      which: The network of a run; the teacher is the better one.
      size: Height and width in pixels to resize to; one number for the shorter side, which keeps
        the shape; 0 for images as they are.
      threshold: Share of a map's mass that its mask holds; None draws no masks.

    Returns: the contact sheets.
    Raises:
      UsageError: something cannot be loaded, opened or written; the network has no attention.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    check_threshold(threshold)
    check_writable(output / "results.json")
    sources = open_pictures(image)
    model, info = load(weights, which=which)
    attend = attention_of(model, info)
    check_size(size, info.patch_size)
    pictures = Pictures(sources, channels=len(info.mean))
    sheets = []
    for name, pixels in tqdm(pictures, desc="attention", unit=" images"):
        fitted = fit(pixels, size, info.patch_size)
        with about(name):
            maps = attend(fitted)
        attended = Attended(name, fitted, maps, info.patch_size, pixels.shape[:2])
        _save_parts(output / f"{name}-attention", attended, threshold)
        sheet = picture_sheet(attended, threshold, title=f"{name}  ({info.source})")
        sheets.append(output / f"{name}-attention.png")
        sheet.save(sheets[-1])
    print(f"contact sheets in {output}: {len(sheets)}")
    if pictures.unreadable:
        print(f"images that cannot be read and were left out: {len(pictures.unreadable)}")
    metrics = {"images": len(sheets), "unreadable_images": pictures.unreadable}
    write_results(output / "results.json", "attention", metrics, settings, info)
    return sheets


def _save_parts(folder: Path, attended: Attended, threshold: float | None) -> None:
    """The network's input, and for the mean and every head the map and the mask over the input."""
    folder.mkdir(exist_ok=True)
    remove_earlier(folder, r"(mean|head\d+)(-mask)?\.png")  # another network may have more heads
    image, patch_size = attended.image, attended.patch_size
    Image.fromarray(as_rgb(image)).save(folder / "image.png")
    colors = [PAPER, *hues(len(attended.maps))]
    for color, (name, values) in zip(colors, named_maps(attended.maps).items(), strict=True):
        part = name.replace(" ", "")
        pixels = to_pixels(values, patch_size, image.shape[:2])
        Image.fromarray(color_map(pixels)).save(folder / f"{part}.png")
        if threshold is not None:
            mask = to_pixels(mass_mask(values, threshold), patch_size, image.shape[:2])
            Image.fromarray(draw_masks(image, mask[None], [color])).save(
                folder / f"{part}-mask.png"
            )
