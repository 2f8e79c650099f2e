"""Writes a folder of generated JPEG images, about as large as ImageNet's. Prints one JSON line.

python benchmarks/jpeg_folder.py FOLDER --number=4096

To time the input pipeline without a dataset: 500x375 and 375x500 pixels, about 93 KB each, colour
fields with enough grain to keep the decoder busy.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from machine import report
from PIL import Image

SIZES = ((500, 375), (375, 500))  # width and height


def image(index: int) -> Image.Image:
    """Image number `index`; the same in every run."""
    random = np.random.default_rng(index)
    size = SIZES[index % len(SIZES)]
    fields = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(fields.resize(size, Image.Resampling.BICUBIC), np.float32)
    grain = random.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels + 18 * grain, 0, 255).astype(np.uint8))


def write_images(folder: Path, number: int) -> list[int]:
    """Writes images to a folder, created if missing. Returns the sizes of the files in bytes."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(index: int) -> int:
        path = folder / f"{index:06}.jpg"
        image(index).save(path, quality=90)
        return path.stat().st_size

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(write, range(number)))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path, help="created if missing")
    flags.add_argument("--number", type=int, default=4096, help="of images")
    flags = flags.parse_args()
    sizes = write_images(flags.folder, flags.number)
    kilobytes = round(sum(sizes) / len(sizes) / 1000, 1)
    report("jpeg_folder", {"number": len(sizes), "mean_kb": kilobytes}, computed_on={})


if __name__ == "__main__":
    main()
