"""Which JPEG decoder is fastest, and do all give the same pixels? Prints one JSON line.

python benchmarks/decode.py --threads 1 2                         # generated images
python benchmarks/decode.py --folder=/imagenet/val --threads 1 16

Pillow, simplejpeg and OpenCV read the files from disk and write their pixels to a canvas: of 512
pixels, which the images fit on, and of 224, with reduced decoding and a bicubic resize as in
`dino_jax.data.decode`. Decoders that are not installed are left out (`pip install simplejpeg
opencv-python-headless`). All pixels are compared with Pillow's, also for grey and progressive
files, every subsampling, and a file with an EXIF orientation, which all must ignore.
"""

import argparse
import importlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jpeg_folder import image, write_images
from machine import report
from PIL import Image

from dino_jax.data.decode import decode, open_image, read_file

Decoder = Callable[[bytes, int], np.ndarray]  # (content of a file, side of the canvas) -> [h, w, 3]

SIDES = (512, 224)  # of the canvases, pixels
ORIENTATION = 0x0112  # EXIF


def fitting(size: tuple[int, int], side: int) -> tuple[int, int, int]:
    """Width and height that fit on a canvas, and the power of two to reduce a JPEG by."""
    scale = min(1, side / max(size))
    width, height = (max(1, round(n * scale)) for n in size)
    halvings = min(size[0] // width, size[1] // height).bit_length() - 1
    return width, height, min(8, 1 << halvings)


def shrunk(pixels: np.ndarray, size: tuple[int, int], to: tuple[int, int, int]) -> np.ndarray:
    """Resizes pixels decoded at a reduced scale as Pillow does; `to` is (width, height, scale)."""
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
    """Versions of the installed decoders other than Pillow."""
    found = {}
    for name, module in MODULES.items():
        try:
            found[name] = importlib.import_module(module).__version__
        except ImportError:
            continue
    return found


def hard_cases() -> list[bytes]:
    """Files that decoders may read differently."""
    source, cases = image(0), []
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    for options in (
        *({"subsampling": n} for n in range(3)),
        {"progressive": True},
        {"exif": turned},
        {"quality": 40},
    ):
        file = io.BytesIO()
        source.save(file, "JPEG", **options)
        cases.append(file.getvalue())
    file = io.BytesIO()
    source.convert("L").save(file, "JPEG")
    return [*cases, file.getvalue()]


def grey_levels_apart(decoder: Decoder, side: int, contents: Sequence[bytes]) -> tuple[int, float]:
    """Maximum and mean difference of a decoder's pixels from Pillow's."""
    apart = []
    for content in contents:
        ours, theirs = with_pillow(content, side), decoder(content, side)
        apart.append(np.abs(ours.astype(np.int16) - theirs).ravel())
    apart = np.concatenate(apart)
    return int(apart.max()), round(float(apart.mean()), 4)


def images_per_s(decoder: Decoder, side: int, paths: Sequence[Path], threads: int) -> float:
    """Images read, decoded and copied to canvases per second."""
    canvas = np.zeros((threads, side, side, 3), np.uint8)

    def work(thread: int) -> None:
        for path in paths[thread::threads]:
            pixels = decoder(read_file(path), side)
            canvas[thread, : pixels.shape[0], : pixels.shape[1]] = pixels

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
    return len(paths) / (time.perf_counter() - start)


def compare(paths: Sequence[Path], threads: Sequence[int], rounds: int) -> dict[str, Any]:
    """Rates and pixels of the installed decoders."""
    installed = ["pillow", *versions()]
    contents = [*hard_cases(), *map(read_file, paths[:8])]
    rates: dict[str, dict[str, float]] = {name: {} for name in installed}
    for side in SIDES:
        for number in threads:
            seen: dict[str, list[float]] = {name: [] for name in installed}
            for _ in range(rounds):
                for name, rates_seen in seen.items():
                    rates_seen.append(images_per_s(DECODERS[name], side, paths, number))
            for name, rates_seen in seen.items():
                rates[name][f"{side} px, {number} threads"] = statistics.median(rates_seen)
    return {
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
        "rounds": rounds,
        **versions(),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--folder", type=Path, help="with .jpg files; default: generated images")
    flags.add_argument("--number", type=int, default=400, help="of files to read")
    flags.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    flags.add_argument("--rounds", type=int, default=5, help="the decoders take turns in each")
    flags = flags.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if flags.folder is None:
            write_images(Path(scratch), flags.number)
        paths = sorted((flags.folder or Path(scratch)).glob("*.jpg"))[: flags.number]
        report("decode", compare(paths, flags.threads, flags.rounds), computed_on={})


if __name__ == "__main__":
    main()
