"""How fast is the input pipeline, and where does its time go? Prints one JSON line.

python benchmarks/data.py                                            # generated images
python benchmarks/data.py --folder=/imagenet/val --number=4096 --threads 1 16

It compares three pipelines, in images per second by number of threads or processes:

  folder     `train_batches`: JPEG files to canvases in host memory. The device makes the crops,
             which `augment.py` measures
  records    the same files, packed
  pil        a pipeline as written in 2021, with PIL in processes: it decodes each file, makes all
             crops, and flips, jitters, blurs, solarizes and normalises them. Boxes and factors
             are drawn beforehand and nothing is sent anywhere, which is to its advantage

The pipelines take turns, and a rate is the median of the rounds. `ms_per_batch` is the time of a
batch on one core by stage: `read` the files, `decode` them, `shrink` images larger than the canvas,
`pack` Pillow's four bytes per pixel into three, `copy` the pixels to the canvases, and `transfer`
the canvases to the device.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
from augment import draw_plans, median_seconds, pil_views
from jpeg_folder import write_images
from machine import report
from PIL import Image

from dino_jax.data.decode import open_image, read_file
from dino_jax.data.pipeline import Records, train_batches
from dino_jax.data.sources import EncodedSource, open_source
from dino_jax.data.transforms.multicrop import CropPlan, CropSettings
from dino_jax.jobs.pack import pack

STAGES = ("read", "decode", "shrink", "pack", "copy")


def pipeline_rate(source: EncodedSource, flags: argparse.Namespace, threads: int) -> float:
    """Images per second of our pipeline over one pass through the source."""
    batches = train_batches(
        Records(source),
        batch_size=flags.batch_size,
        seed=0,
        start_step=0,
        canvas_size=flags.canvas,
        num_threads=threads,
    )
    with contextlib.closing(batches):
        count = len(source) // flags.batch_size
        next(batches)  # so that as much is read ahead at the start as at the end
        start = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        return count * flags.batch_size / (time.perf_counter() - start)


def make_pil_views(path: str, plans: Sequence[CropPlan], settings: CropSettings) -> int:
    """The work of a PIL process for one file; returns the number of bytes of its views."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    sides = settings.global_size, settings.local_size
    views = [
        pil_views(image, plan, side, settings) for plan, side in zip(plans, sides, strict=True)
    ]
    return sum(view.nbytes for view in views)


def pil_rate(
    paths: Sequence[str],
    plans: Sequence[Sequence[CropPlan]],
    settings: CropSettings,
    pool: Executor,
) -> float:
    """Images per second of the PIL pipeline."""
    start = time.perf_counter()
    list(pool.map(make_pil_views, paths, plans, itertools.repeat(settings)))
    return len(plans) / (time.perf_counter() - start)


def crop_plans(
    source: EncodedSource, number: int, settings: CropSettings
) -> list[tuple[CropPlan, ...]]:
    """The plans of the global and local crops of each of the first images."""
    sizes = np.array([source.image(i).size[::-1] for i in range(number)], np.int32)
    plans = draw_plans(jax.random.split(jax.random.key(0), number), sizes, settings)
    return [tuple(CropPlan(*(leaf[i] for leaf in plan)) for plan in plans) for i in range(number)]


def ms_per_batch(source: EncodedSource, batch_size: int, side: int) -> dict[str, float]:
    """Milliseconds of each stage on one core: the median over images times the batch size."""
    canvas = np.zeros((batch_size, side, side, 3), np.uint8)
    marks = []
    for index in range(min(len(source), 4 * batch_size)):
        mark = [time.perf_counter()]
        content = read_file(source.name(index))
        mark.append(time.perf_counter())
        image = open_image(io.BytesIO(content))
        scale, box = min(1, side / max(image.size)), None
        size = tuple(max(1, round(n * scale)) for n in image.size)
        if scale < 1 and (draft := image.draft(None, size)):
            _, box = draft
        image = image.convert("RGB")
        mark.append(time.perf_counter())
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC, box)
        mark.append(time.perf_counter())
        pixels = np.asarray(image)
        mark.append(time.perf_counter())
        canvas[index % batch_size, : pixels.shape[0], : pixels.shape[1]] = pixels
        mark.append(time.perf_counter())
        marks.append(mark)
    seconds = dict(zip(STAGES, batch_size * np.median(np.diff(marks), axis=0), strict=True))
    seconds["transfer"] = median_seconds(lambda: jax.block_until_ready(jax.device_put(canvas)), 0.5)
    return {stage: round(1e3 * float(each), 2) for stage, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="with JPEG files; default: generated images")
    parser.add_argument("--number", type=int, default=512, help="of images read from the folder")
    parser.add_argument("--pil-number", type=int, default=32, help="of these, per process of PIL")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--canvas", type=int, default=512, help="side in pixels")
    parser.add_argument("--global-size", type=int, default=224, help="pixels; two crops per image")
    parser.add_argument("--local-size", type=int, default=96, help="pixels")
    parser.add_argument("--local-number", type=int, default=8, help="local crops per image")
    flags = parser.parse_args()
    settings = CropSettings(
        global_size=flags.global_size,
        local_size=flags.local_size,
        local_number=flags.local_number,
    )
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if flags.folder is None:
            write_images(scratch / "jpeg", flags.number)
        folder = open_source(f"folder:{flags.folder or scratch / 'jpeg'}[:{flags.number}]")
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            pack(folder.spec, scratch / "packed")
        pack_seconds = time.perf_counter() - start
        records = open_source(f"records:{scratch / 'packed'}")
        plans = crop_plans(
            folder, min(flags.pil_number * max(flags.threads), len(folder)), settings
        )
        paths = [folder.name(i) for i in range(len(plans))]
        rates: dict[str, dict[str, float]] = {"folder": {}, "records": {}, "pil": {}}
        for threads in flags.threads:
            seen: dict[str, list[float]] = {side: [] for side in rates}
            spawn = multiprocessing.get_context("spawn")  # a fork would break JAX's threads
            all_started = spawn.Barrier(threads).wait
            with ProcessPoolExecutor(threads, spawn, all_started) as pool:
                few = slice(flags.pil_number * threads)
                pil_rate(paths[few], plans[few], settings, pool)  # starts the processes
                for _ in range(flags.rounds):
                    seen["folder"].append(pipeline_rate(folder, flags, threads))
                    seen["records"].append(pipeline_rate(records, flags, threads))
                    seen["pil"].append(pil_rate(paths[few], plans[few], settings, pool))
            for side, values in seen.items():
                rates[side][str(threads)] = round(statistics.median(values), 1)
        stages = ms_per_batch(folder, flags.batch_size, flags.canvas)
    result = {
        "images_per_s": rates,
        "over_pil": {
            side: {n: round(rate / rates["pil"][n], 2) for n, rate in rates[side].items()}
            for side in ("folder", "records")
        },
        "ms_per_batch": stages,
        "pack_images_per_s": round(len(folder) / pack_seconds, 1),
        "images": len(folder),
        "source": str(flags.folder or "generated"),
        **{
            name: value
            for name, value in vars(flags).items()
            if name not in ("folder", "number", "threads")
        },
    }
    report("data", result)


if __name__ == "__main__":
    main()
