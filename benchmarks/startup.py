"""How long until a run has made its first step, and until `--help` answers? Prints one JSON line.

python benchmarks/startup.py                                      # small, for a laptop's CPU
python benchmarks/startup.py --config=configs/vit_small.py --batch-size=64        # a GPU

It starts `python main.py` as a user does, on generated images.

  first_step_s      seconds from the start of the process to the end of its first training step:
                    `cold` with an empty compilation cache, `warm` with the cache of the cold run.
                    Medians over rounds
  warm_share        warm time divided by cold time
  cache_mib         size of the cache after one run
  help_s            seconds until `--help` of main.py and of every job has been printed
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from config_flag import ROOT, describe, load, parser
from machine import report

from dino_jax.cli import JOBS


def seconds_to_first_step(command: list[str], workdir: Path, cache: Path) -> float:
    """Starts a run of one step; returns the seconds until its log contains that step."""
    environment = os.environ | {
        "DINO_JAX_CACHE": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    log = workdir / "metrics.jsonl"
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        if process.wait():
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{output.read().decode()}")
    return seconds


def seconds_to_help(command: list[str]) -> float:
    """Seconds until a command has printed its help."""
    start = time.perf_counter()
    subprocess.run([*command, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def device() -> dict[str, Any]:
    """The device, described by another process: the first to ask reserves a GPU's memory."""
    command = [sys.executable, ROOT / "benchmarks/machine.py"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    return {key: answer[key] for key in ("backend", "device", "devices")}


def first_steps(command: list[str], rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds with an empty and with a filled cache, and the size of the latter in MiB."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            for kind in seconds:
                run = seconds_to_first_step(command, Path(folder) / kind, cache)
                seconds[kind].append(run)
            kept = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    return {kind: statistics.median(each) for kind, each in seconds.items()}, kept / 2**20


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=3, help="of a cold and a warm start")
    flags.add_argument("--jobs", nargs="*", default=list(JOBS), help="to time the --help of")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    command = [sys.executable, "main.py", f"--config={flags.config}", *overrides]
    command += [  # a run of one step, which it logs when finished
        f"--config.train.batch_size={flags.batch_size}",
        f"--config.data.train=shapes:{flags.batch_size}@train",
        "--config.train.epochs=1",
        "--config.log.every_steps=1",
        "--config.eval.knn_every_epochs=0",
        "--config.log.attention_sheet=0",
    ]
    seconds, cache_mib = first_steps(command, flags.rounds)
    cli = [sys.executable, "-m", "dino_jax"]
    helps = {"main": [sys.executable, "main.py"], "jobs": cli}
    helps |= {job: [*cli, job] for job in flags.jobs}
    help_s = {name: round(seconds_to_help(words), 2) for name, words in helps.items()}
    result = {
        "first_step_s": {kind: round(s, 2) for kind, s in seconds.items()},
        "warm_share": round(seconds["warm"] / seconds["cold"], 3),
        "cache_mib": round(cache_mib, 2),
        "help_s": help_s,
        "help_s_max": max(help_s.values()),
    }
    about = {"rounds": flags.rounds}
    report("startup", result | describe(flags, config) | about, computed_on=device())


if __name__ == "__main__":
    main()
