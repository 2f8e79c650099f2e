"""Which decoder? JPEG files to canvases by Pillow, OpenCV and simplejpeg; prints one JSON line.

python benchmarks/jpeg_folder.py FOLDER --number=400
python benchmarks/decode.py --folder=FOLDER --threads 1 2

Each decoder reads the files from disk and leaves their pixels on a canvas: whole (on one of 512
pixels) and shrunk (on one of 224, by a reduced decoding and a bicubic resize, as
`dino_jax.data.decode` does it). Needs `pip install simplejpeg opencv-python-headless`; those that
are missing are left out. The pixels of all decoders are compared with Pillow's, also those of grey
and progressive files, of all subsamplings, and of one with an EXIF orientation, which all must
ignore.
"""

import argparse
import importlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from jpeg_folder import picture
from PIL import Image

from dino_jax.data.decode import decode, open_image, read_file

Decoder = Callable[[bytes, int], np.ndarray]  # a file's content, side of the canvas: [h, w, 3]

SIDES = (512, 224)  # of the canvases, pixels
ORIENTATION = 0x0112  # EXIF


def fitting(size: tuple[int, int], side: int) -> tuple[int, int, int]:
    """Width and height that fit on a canvas, and the power of two to decode a JPEG at."""
    scale = min(1, side / max(size))
    width, height = (max(1, round(n * scale)) for n in size)
    halvings = min(size[0] // width, size[1] // height).bit_length() - 1
    return width, height, min(8, 1 << halvings)


def shrunk(pixels: np.ndarray, size: tuple[int, int], to: tuple[int, int, int]) -> np.ndarray:
    """Resizes what was decoded at a reduced scale, to (width, height, scale), as Pillow does."""
    *target, scale = to
    if pixels.shape[1::-1] == tuple(target):
        return pixels
    box = (0, 0, size[0] / scale, size[1] / scale)
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC, box))


def with_pillow(content: bytes, side: int) -> np.ndarray:
    return decode(open_image(io.BytesIO(content)), max_side=side)


def with_simplejpeg(content: bytes, side: int) -> np.ndarray:
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    *_, scale = to = fitting((width, height), side)
    least = {"min_width": -(-width // scale), "min_height": -(-height // scale)}
    pixels = simplejpeg.decode_jpeg(content, **least if scale > 1 else {})
    return shrunk(pixels, (width, height), to)


def with_opencv(content: bytes, side: int) -> np.ndarray:
    import cv2

    with Image.open(io.BytesIO(content)) as header:
        size = header.size
    *_, scale = to = fitting(size, side)
    reduced = getattr(cv2, f"IMREAD_REDUCED_COLOR_{scale}") if scale > 1 else cv2.IMREAD_COLOR
    flags = reduced | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return shrunk(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), size, to)


DECODERS = {"pillow": with_pillow, "simplejpeg": with_simplejpeg, "opencv": with_opencv}
MODULES = {"simplejpeg": "simplejpeg", "opencv": "cv2"}


def versions() -> dict[str, str]:
    """Of the decoders that are installed."""
    found = {"pillow": PIL.__version__}
    for name, module in MODULES.items():
        try:
            found[name] = importlib.import_module(module).__version__
        except ImportError:
            continue
    return found


def hard_cases() -> list[bytes]:
    """Files that decoders may read differently."""
    image, cases = picture(0), []
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    for options in (
        *({"subsampling": n} for n in range(3)),
        {"progressive": True},
        {"exif": turned},
        {"quality": 40},
    ):
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        cases.append(file.getvalue())
    file = io.BytesIO()
    image.convert("L").save(file, "JPEG")
    return [*cases, file.getvalue()]


def grey_levels_apart(decoder: Decoder, side: int, contents: Sequence[bytes]) -> tuple[int, float]:
    """The most and the mean that a decoder's pixels differ from Pillow's."""
    apart = []
    for content in contents:
        ours, theirs = with_pillow(content, side), decoder(content, side)
        apart.append(np.abs(ours.astype(np.int16) - theirs).ravel())
    apart = np.concatenate(apart)
    return int(apart.max()), round(float(apart.mean()), 4)


def images_per_s(decoder: Decoder, side: int, paths: Sequence[Path], threads: int) -> float:
    """Rate of reading, decoding and copying to canvases."""
    canvas = np.zeros((threads, side, side, 3), np.uint8)

    def work(thread: int) -> None:
        for path in paths[thread::threads]:
            pixels = decoder(read_file(path), side)
            canvas[thread, : pixels.shape[0], : pixels.shape[1]] = pixels

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
    return len(paths) / (time.perf_counter() - start)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--folder", type=Path, required=True, help="of .jpg files")
    flags.add_argument("--number", type=int, default=400, help="of its files that are read")
    flags.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    flags.add_argument("--rounds", type=int, default=5, help="in which the decoders take turns")
    flags = flags.parse_args()
    paths, installed = sorted(flags.folder.glob("*.jpg"))[: flags.number], versions()
    contents = [*hard_cases(), *map(read_file, paths[:8])]
    rates: dict[str, dict[str, float]] = {name: {} for name in installed}
    for side in SIDES:
        for threads in flags.threads:
            seen: dict[str, list[float]] = {name: [] for name in installed}
            for _ in range(flags.rounds):
                for name, rates_seen in seen.items():
                    rates_seen.append(images_per_s(DECODERS[name], side, paths, threads))
            for name, rates_seen in seen.items():
                rates[name][f"{side} px, {threads} threads"] = statistics.median(rates_seen)
    result = {
        "benchmark": "decode",
        "images_per_s": {
            name: {case: round(rate, 1) for case, rate in rated.items()}
            for name, rated in rates.items()
        },
        "over_pillow": {
            name: {case: round(rate / rates["pillow"][case], 2) for case, rate in rated.items()}
            for name, rated in rates.items()
            if name != "pillow"
        },
        "grey_levels_apart": {
            name: {
                f"{side} px": grey_levels_apart(DECODERS[name], side, contents) for side in SIDES
            }
            for name in installed
            if name != "pillow"
        },
        "images": len(paths),
        "rounds": flags.rounds,
        "cores": os.cpu_count(),
        **installed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
