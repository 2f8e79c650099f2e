"""Short scripts in a subprocess."""

import subprocess
import sys


def run_script(script: str, *options: str) -> tuple[int, str, str]:
    """Runs a Python script and returns its exit code, standard output and standard error."""
    command = [sys.executable, *options, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr
