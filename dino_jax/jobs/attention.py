"""The attention job: maps, masks and a contact sheet for every picture."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
from PIL import Image
from tyro.conf import arg

from dino_jax.data.sources.folder import check_apart
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.picture_features import AttentionMaps, check_attention
from dino_jax.jobs.drawing import OPTIONS, over_pictures, records_of, unread
from dino_jax.jobs.results import report
from dino_jax.output import check_writable, remove_earlier
from dino_jax.paths import local_paths
from dino_jax.visualize.attention_masks import THRESHOLD, check_threshold, mass_mask, to_pixels
from dino_jax.visualize.attention_sheet import Attended, named_maps, picture_sheet
from dino_jax.visualize.pictures import SIZE, fit_to_patches, open_pictures, read_pixels
from dino_jax.visualize.sheet import PAPER, as_rgb, color_map, draw_masks, hues


@local_paths
def attention(
    weights: str,
    image: tuple[str, ...],
    output: Path,
    size: tuple[int, ...] = SIZE,
    threshold: float | None = THRESHOLD,
    options: Annotated[PassOptions, arg(name="")] = OPTIONS,
) -> list[Path]:
    """Draws the attention of the class token in the last block, for every head.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      image: Image files, folders or other sources, any number of them.
      output: Output folder: NAME-attention.png is the contact sheet of a picture, and a folder
        NAME-attention contains the network's input, all maps, and their masks over the input.
      size: Height and width in pixels to resize to; one number for the shorter side, which keeps
        the aspect ratio; 0 to keep the size of the images.
      threshold: Share of a map's mass that its mask holds; None for no masks.
      options: How the backbone processes the pictures.

    Returns: the contact sheets.
    Raises:
      UsageError: something cannot be loaded, opened or written, or the network has no attention.
    """
    check_threshold(threshold)
    check_writable(output / "results.json")
    source = open_pictures(image)
    check_apart(source, output, "output")
    backbone = PlacedBackbone(weights, options)
    info = backbone.info
    check_attention(backbone.model, info.source)
    records, names = records_of(backbone, source), source.stems()
    sheets: dict[int, Path] = {}
    maps_of = AttentionMaps(info.mean, info.std)
    for index, maps in over_pictures(backbone, maps_of, records, size):
        sheets[index] = output / f"{names[index]}-attention.png"
        if jax.process_index() > 0 or (pixels := read_pixels(records, index)) is None:
            continue
        fitted = fit_to_patches(pixels, size, info.patch_size)
        attended = Attended(names[index], fitted, maps, info.patch_size, pixels.shape[:2])
        _save_parts(sheets[index].with_suffix(""), attended, threshold)
        sheet = picture_sheet(attended, threshold, title=f"{names[index]}  ({info.source})")
        sheet.save(sheets[index])
    skipped = unread(source, list(sheets))
    settings = {"weights": weights, "image": image, "size": size, "threshold": threshold}
    report(
        output / "results.json",
        "attention",
        {"images": len(sheets), "unreadable_images": skipped},
        settings | dataclasses.asdict(options),
        info,
        notes=[f"contact sheets in {output}: {len(sheets)}"],
        unreadable={source.spec: len(skipped)},
    )
    return [sheets[index] for index in sorted(sheets)]


def _save_parts(folder: Path, attended: Attended, threshold: float | None) -> None:
    """Writes the network's input, and the map and mask of the mean and of every head."""
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
