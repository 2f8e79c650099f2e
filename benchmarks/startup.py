"""How long until a run trains, and until a command answers? Prints one JSON line.

python benchmarks/startup.py                                      # small, for a laptop's CPU
python benchmarks/startup.py --config=configs/vit_small.py --batch-size=64        # a GPU

It starts `python main.py` as a user does, on generated pictures, and reports

  first_step_s      seconds from the start of the process to the end of its first training step:
                    `cold` with an empty cache of compiled programs, `warm` with what that run left
                    there; medians over rounds of one process each
  warm_share        of the cold time
  cache_mib         what one run leaves in the cache
  help_s            seconds until `--help` of main.py and of every job has been printed
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from config_flag import ROOT, describe, load, parser

from dino_jax.cli import JOBS


def seconds_to_first_step(command: list[str], workdir: Path, cache: Path) -> float:
    """Starts a run and ends it when its log has the first step."""
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
    """Until a command has printed its help."""
    start = time.perf_counter()
    subprocess.run([*command, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def device_kind() -> str:
    """What JAX computes on; asked of another process, since a GPU's memory goes to the first."""
    question = "import jax; print(jax.devices()[0].device_kind)"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    return answer.stdout.strip()


def first_steps(command: list[str], rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds with an empty cache and with a filled one, and the MiB that fill it."""
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
    flags.add_argument("--rounds", type=int, default=3, help="cold and warm starts")
    flags.add_argument("--jobs", nargs="*", default=list(JOBS), help="whose --help is timed")
    flags, overrides = flags.parse_known_args()
    config = load(flags, overrides)
    command = [sys.executable, "main.py", f"--config={flags.config}", *overrides]
    command += [  # a run of one step, whose log has it when it is finished
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
    about = {"rounds": flags.rounds, "device": device_kind(), "cores": os.cpu_count()}
    about |= {name: version(name) for name in ("jax", "jaxlib")}
    print(json.dumps({"benchmark": "startup"} | result | describe(flags, config) | about))


if __name__ == "__main__":
    main()
