"""How much time and memory does it take to read and convert a checkpoint? Prints one JSON line.

python benchmarks/convert.py                       # ViT-B/16 with 65536 prototypes

PyTorch only writes the file: a full checkpoint of random numbers, with the reference's names and
layout. Each measurement runs in its own process. Its memory is the peak (VmHWM) minus that of a
process that only imports the package; pages of the mapped file count. The file has just been
written, so it is usually read from the page cache and not from disk.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import report

from dino_jax.models import MODELS, DINOHead, create_model
from dino_jax.models.network import abstract
from dino_jax.weights.layouts.mapping import torch_shapes

WORK = {
    "imports": "import dino_jax.cli",
    "read": """
import dino_jax.cli
from dino_jax.weights.layouts.torch_checkpoint import read_torch_checkpoint
found = read_torch_checkpoint(sys.argv[1])
parts = [part for network in found.networks.values() for part in (network.backbone, network.head)]
tensors = [x for part in parts for x in part.values()]
tensors += [x for entry in found.optimizer["state"].values() for x in entry.values()]
sum(float(x.sum()) for x in tensors)  # reads every number
""",
    "convert": "import dino_jax.cli; dino_jax.cli.main(['convert', *sys.argv[1:]])",
}
PEAK = """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])
"""


def make_file(path: Path, model: str, out_dim: int) -> None:
    """Writes a full checkpoint of a ViT after one epoch."""
    import torch

    width = MODELS[model].keywords["embed_dim"]
    parts = {
        "backbone": ("vit", abstract(lambda rngs: create_model(model, rngs=rngs))),
        "head": ("head", abstract(lambda rngs: DINOHead(width, out_dim, rngs=rngs))),
    }
    shapes = {
        f"{part}.{name}": empty.shape
        for part, (family, (_, *trees)) in parts.items()
        for name, empty in torch_shapes(*trees, family).items()
    }
    trained = [shape for name, shape in shapes.items() if not name.endswith("weight_g")]
    trained.sort(key=lambda shape: len(shape) == 1)  # stable; parameters with weight decay first
    decayed = sum(len(shape) > 1 for shape in trained)
    numbers = list(range(len(trained)))
    whole = {
        "student": {f"module.{name}": torch.randn(shape) for name, shape in shapes.items()},
        "teacher": {name: torch.randn(shape) for name, shape in shapes.items()},
        "optimizer": {
            "state": {
                i: {
                    "step": torch.tensor(5.0),
                    "exp_avg": torch.randn(shape),
                    "exp_avg_sq": torch.rand(shape),
                }
                for i, shape in enumerate(trained)
            },
            "param_groups": [{"params": numbers[:decayed]}, {"params": numbers[decayed:]}],
        },
        "epoch": 1,
        "args": argparse.Namespace(epochs=100),
        "dino_loss": {"center": torch.randn(1, out_dim)},
    }
    torch.save(whole, path)


def measure(work: str, *arguments: object) -> tuple[float, float]:
    """Runs some work in a process. Returns its seconds and its peak memory in GiB."""
    command = [sys.executable, "-c", f"import sys\n{work}\n{PEAK}", *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds, int(done.stdout.split()[-1]) / 2**20


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    vits = [name for name, build in MODELS.items() if build.func.family == "vit"]
    flags.add_argument("--model", default="vit_base", choices=vits)
    flags.add_argument("--out-dim", type=int, default=65536, help="prototypes")
    flags = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "full.pth"
        maker = multiprocessing.get_context("spawn").Process(
            target=make_file, args=(file, flags.model, flags.out_dim)
        )
        maker.start()  # a separate process, so that its memory is freed
        maker.join()
        if maker.exitcode:
            sys.exit("cannot write the checkpoint; PyTorch is needed: pip install -e '.[torch]'")
        size = file.stat().st_size / 2**30
        import_seconds, import_peak = measure(WORK["imports"])
        result = {**vars(flags), "file_gib": round(size, 3)}
        for work, arguments in (("read", [file]), ("convert", [file, Path(folder) / "out"])):
            seconds, peak = measure(WORK[work], *arguments)
            result[f"{work}_s"] = round(seconds - import_seconds, 2)
            result[f"{work}_peak_gib"] = round(peak - import_peak, 3)
            result[f"{work}_peak_over_file"] = round((peak - import_peak) / size, 2)
    result |= {
        "imports_s": round(import_seconds, 2),
        "imports_gib": round(import_peak, 3),
    }
    report("convert", result)


if __name__ == "__main__":
    main()
