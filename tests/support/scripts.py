"""Short scripts in a process of their own."""

import subprocess
import sys


def run_script(script: str, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a Python script."""
    command = [sys.executable, *options, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr
