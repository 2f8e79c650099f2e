"""Sets up runs with several processes."""

import os
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.errors import UsageError
from dino_jax.peers import watch_peers

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # the number of processes


def initialize_if_launched() -> None:
    """Calls `jax.distributed.initialize` if a launcher has started several processes.

    JAX itself recognises Slurm (`srun`) and Open MPI 4 (`mpirun`). With any other launcher, set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. In a
    single process this does nothing. Call it before any other JAX function.

    Raises:
      UsageError: only some of the three variables are set, their values are invalid, JAX cannot
        find the launcher's processes, or the launcher is PyTorch's.
    """
    given = [name for name in EXPLICIT if name in os.environ]
    if not given and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} and RANK={os.environ['RANK']} come from a "
            "launcher of PyTorch, such as torchrun, which JAX does not read: run the command "
            "without it, as one process uses all GPUs of a host. For several hosts use srun, or "
            f"set {', '.join(EXPLICIT)} for each"
        )
    if given and len(given) < len(EXPLICIT):
        missing = ", ".join(name for name in EXPLICIT if name not in os.environ)
        raise UsageError(f"{', '.join(given)} is set without {missing}: set all three or none")
    if given:
        address, number, index = (os.environ[name] for name in EXPLICIT)
        if not (number.isdecimal() and index.isdecimal() and int(index) < int(number)):
            raise UsageError(
                f"JAX_PROCESS_ID={index} and JAX_NUM_PROCESSES={number} must be whole numbers, the "
                "first less than the second"
            )
        if not re.fullmatch(r".+:\d+", address):
            raise UsageError(f"JAX_COORDINATOR_ADDRESS={address} must be host:port of process 0")
        # Without detection, because a surrounding launcher would limit each process to one device.
        jax.distributed.initialize(
            address, int(number), int(index), cluster_detection_method="deactivate"
        )
        watch_peers()
    elif launchers := [name for name in LAUNCHERS if os.environ.get(name, "1") != "1"]:
        try:
            jax.distributed.initialize()
        except (ValueError, KeyError) as error:  # an environment variable is missing
            variable = launchers[0]
            raise UsageError(
                f"{variable}={os.environ[variable]} indicates several processes, but JAX cannot "
                f"find them ({error}): start them with srun or Open MPI 4's mpirun, set "
                f"{', '.join(EXPLICIT)} for each process, or unset {variable} to run a single one"
            ) from error
        watch_peers()


def least_of_hosts(value: int) -> int:
    """The smallest value of all hosts, at most 2**50, so that all of them decide alike.

    Every host must call this. It is only needed for values that differ between hosts, such as
    memory.
    """
    if jax.process_count() == 1:
        return value
    words = np.array([value >> 20, value & 0xFFFFF], np.int32)  # JAX would cut 64 bits to 32
    everywhere = multihost_utils.process_allgather(words).reshape(-1, 2).tolist()
    return min((high << 20) + low for high, low in everywhere)
