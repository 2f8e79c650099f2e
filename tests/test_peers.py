"""Processes that end while others of the same run continue."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dino_jax.distributed import EXPLICIT
from tests.support import runs
from tests.test_distributed import free_port

SCRIPT = """
import sys, time
from dino_jax import distributed, peers
peers.BEAT_SECONDS, peers.SILENCE_SECONDS = 0.2, 1.0
distributed.initialize_if_launched()
print("started", flush=True)
sys.stdin.read()
"""


@contextmanager
def pair() -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that wait until their standard input is closed."""
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        processes = []
        for index in range(2):
            environment = dict(zip(EXPLICIT, (address, "2", str(index)), strict=True))
            processes.append(
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", SCRIPT],
                        cwd=runs.ROOT,
                        env=os.environ | environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            )
        try:
            for process in processes:
                assert process.stdout.readline() == "started\n", process.communicate()[1]
            yield processes
        finally:
            for process in processes:
                process.kill()


def test_names_the_process_that_is_gone() -> None:
    with pair() as (survivor, gone):
        gone.kill()
        error = next(x for x in iter(survivor.stderr.readline, "") if x.startswith("error: "))
    rest = r"\d\d:\d\d:\d\d\. If JAX ends this process, start .* the same command"
    assert re.match(f"error: process 1 on .+ has been silent since {rest}", error)


def test_names_the_process_that_ended() -> None:
    """It may have ended with an error."""
    with pair() as (survivor, ended):
        ended.stdin.close()
        warning = next(x for x in iter(survivor.stderr.readline, "") if x.startswith("warning: "))
        assert re.match(r"warning: process 1 on .+ ended at .+ and this process still", warning)


def test_a_normal_end_is_not_reported() -> None:
    with pair() as processes:
        processes[0].stdin.close()
        processes[1].stdin.close()
        for process in processes:
            assert process.wait(20) == 0
            assert not re.search("error: |warning: ", process.stderr.read())
