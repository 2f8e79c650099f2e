"""Writes a folder of generated JPEG pictures, about as large as ImageNet's.

python benchmarks/jpeg_folder.py FOLDER --number=4096

For timing the pipeline where no pictures are at hand: 500x375 and 375x500 pixels, near 93 KB each,
colour fields with enough grain to make the decoder work. Prints one JSON line.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((500, 375), (375, 500))  # width and height


def picture(index: int) -> Image.Image:
    """Picture `index`; the same in every run."""
    random = np.random.default_rng(index)
    size = SIZES[index % len(SIZES)]
    fields = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(fields.resize(size, Image.Resampling.BICUBIC), np.float32)
    grain = random.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels + 18 * grain, 0, 255).astype(np.uint8))


def write_pictures(folder: Path, number: int) -> list[int]:
    """Fills a folder, made if missing; gives the sizes of the files in bytes."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(index: int) -> int:
        path = folder / f"{index:06}.jpg"
        picture(index).save(path, quality=90)
        return path.stat().st_size

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(write, range(number)))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path, help="made if missing")
    flags.add_argument("--number", type=int, default=4096, help="of pictures")
    flags = flags.parse_args()
    sizes = write_pictures(flags.folder, flags.number)
    kilobytes = round(sum(sizes) / len(sizes) / 1000, 1)
    print(json.dumps({"benchmark": "jpeg_folder", "number": len(sizes), "mean_kb": kilobytes}))


if __name__ == "__main__":
    main()
