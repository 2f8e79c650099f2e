"""Benchmark results, one JSON object a line, as Markdown tables.

python benchmarks/table.py benchmarks/results/gpu.jsonl
"""

import json
import sys
from typing import Any

Row = dict[str, Any]

# Headings, and where in a result their values are; a dot leads into an object.
COLUMNS = {
    "check": {"what": "what", "passed": "passed", "summary": "summary"},
    "train_step": {
        "config": "config",
        "batch": "batch_size",
        "dtype": "dtype",
        "remat": "remat",
        "attention": "attention",
        "images/s": "images_per_s",
        "step ms": "step_ms",
        "FLOP utilisation": "utilisation",
        "measured peak TFLOP/s": "peak_tflops",
        "memory GiB": "peak_memory_gib",
        "crops' share": "crops_share",
        "Python ms": "python_overhead_ms",
        "dispatch ms": "dispatch_ms",
        "compile s": "compile_s",
        "images/s with data": "data.images_per_s",
        "data wait": "data.wait_share",
        "does not fit": "out_of_memory",
    },
    "peer_torch": {
        "config": "config",
        "batch": "batch_size",
        "attention": "sides.ours.attention",
        "ours ms": "step_ms.ours",
        "eager ms": "step_ms.eager",
        "modern ms": "step_ms.modern",
        "timm ms": "step_ms.timm",
        "eager / ours": "ratio.eager",
        "modern / ours": "ratio.modern",
        "timm / ours": "ratio.timm",
        "ours GiB": "peak_memory_gib.ours",
        "eager GiB": "peak_memory_gib.eager",
        "modern GiB": "peak_memory_gib.modern",
        "timm GiB": "peak_memory_gib.timm",
        "refused": "refused",
    },
    "features": {
        "config": "config",
        "batch": "batch_size",
        "image": "image_size",
        "dtype": "sides.ours.dtype",
        "ours images/s": "images_per_s.ours",
        "torch images/s": "images_per_s.torch",
        "torch / ours": "ratio",
        "apart": "apart",
    },
    "variants": {
        "config": "config",
        "batch": "batch_size",
        "dtype": "about.dtype",
        "attention": "about.attention",
        "step ms": "step_ms",
        "ratio": "ratio",
        "temporary MB an image": "mb_per_image",
        "refused": "refused",
    },
    "attention": {
        "images": "images",
        "heads": "heads",
        "ms by tokens, XLA": "ms.xla",
        "cuDNN": "ms.cudnn",
        "XLA / cuDNN": "ratio",
        "refused": "refused",
    },
    "augment": {
        "batch": "batch",
        "canvas": "canvas",
        "device images/s": "device_images_per_s",
        "PIL images/s, one core": "pil_images_per_s_one_core",
        "ratio": "ratio",
        "grey levels apart, mean": "grey_levels_apart_mean",
    },
    "data": {
        "batch": "batch_size",
        "canvas": "canvas",
        "images/s, folder": "images_per_s.folder",
        "records": "images_per_s.records",
        "PIL as of 2021": "images_per_s.pil",
        "folder / PIL": "over_pil.folder",
        "ms a batch: read": "ms_per_batch.read",
        "decode": "ms_per_batch.decode",
        "shrink": "ms_per_batch.shrink",
        "pack": "ms_per_batch.pack",
        "copy": "ms_per_batch.copy",
        "transfer": "ms_per_batch.transfer",
    },
    "decode": {
        "images/s, Pillow": "images_per_s.pillow",
        "simplejpeg / Pillow": "over_pillow.simplejpeg",
        "OpenCV / Pillow": "over_pillow.opencv",
        "grey levels apart (most, mean)": "grey_levels_apart",
    },
    "convert": {
        "model": "model",
        "prototypes": "out_dim",
        "file GiB": "file_gib",
        "read s": "read_s",
        "read GiB": "read_peak_gib",
        "read / file": "read_peak_over_file",
        "convert s": "convert_s",
        "convert GiB": "convert_peak_gib",
        "convert / file": "convert_peak_over_file",
    },
    "activations": {
        "config": "config",
        "dtype": "dtype",
        "MB an image, remat none": "kept_mb.none",
        "dots": "kept_mb.dots",
        "full": "kept_mb.full",
        "share, dots": "share.dots",
        "share, full": "share.full",
    },
    "startup": {
        "config": "config",
        "batch": "batch_size",
        "device": "device",
        "first step, cold s": "first_step_s.cold",
        "warm s": "first_step_s.warm",
        "warm / cold": "warm_share",
        "cache MiB": "cache_mib",
        "main.py --help s": "help_s.main",
        "slowest --help s": "help_s_max",
    },
    "scaling": {
        "config": "config",
        "batch a GPU": "batch_size",
        "step ms": "step_ms",
        "from": "step_ms_from",
        "parameters MB": "parameter_mb",
        **{
            f"{mode} {gpus}, {overlap} overlap": f"efficiency.{mode}.{gpus}.{overlap}"
            for mode in ("dp", "fsdp")
            for gpus in (8, 64, 512)
            for overlap in ("none", "full")
        },
    },
    "knn": {
        "queries": "queries",
        "bank": "bank",
        "width": "width",
        "k": "ks",
        "ours s": "seconds.ours",
        "reference s": "seconds.reference",
        "reference / ours": "ratio",
        "percent apart": "percent_apart",
    },
    "learning_parity": {
        "changed": "changed",
        "k-NN after epochs": "ours.knn10",
        "mean loss of each": "ours.loss",
        "seconds": "ours.seconds",
    },
    "learning_torch": {
        "crops": "crops",
        "seed": "seed",
        "changed": "changed",
        "mean loss of each epoch": "loss",
    },
    "failed": {"command": "command", "why": "why"},
}


def value(row: Row, path: str) -> str:
    """What a result says at a path; empty where it says nothing."""
    here: Any = row
    for key in path.split("."):
        here = here.get(key) if isinstance(here, dict) else None
    return "" if here is None else text(here)


def text(found: Any) -> str:
    """A cell: what an object or a list holds, without brackets."""
    if isinstance(found, dict):
        return "; ".join(f"{key}: {text(each)}" for key, each in found.items())
    if isinstance(found, list):
        return ", ".join(map(text, found))
    return str(found)


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """A Markdown table, a row for each result."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[value(row, path) for path in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    with open(sys.argv[1]) as file:
        results = [json.loads(line) for line in file]
    for name, columns in COLUMNS.items():
        if rows := [row for row in results if row["benchmark"] == name]:
            print(f"\n**{name}**\n\n{table(rows, columns)}")


if __name__ == "__main__":
    main()
