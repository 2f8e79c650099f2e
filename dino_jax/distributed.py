"""Several hosts: joins the other processes of a launcher."""

import os
import re

import jax

from dino_jax.errors import UsageError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # numbers of processes


def initialize_if_launched() -> None:
    """Calls `jax.distributed.initialize` where a launcher's environment shows several processes.

    Slurm (`srun`) and Open MPI 4 (`mpirun`) are recognised by JAX itself; anything else sets
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without
    them this does nothing. Call it before anything else of JAX.

    Raises:
      UsageError: some of the three variables are set and others are not, they make no sense, or
        JAX cannot make out the processes of a launcher.
    """
    given = [name for name in EXPLICIT if name in os.environ]
    if given and len(given) < len(EXPLICIT):
        missing = ", ".join(name for name in EXPLICIT if name not in os.environ)
        raise UsageError(f"{', '.join(given)} is set without {missing}: set all three or none")
    if given:
        address, number, index = (os.environ[name] for name in EXPLICIT)
        if not (number.isdecimal() and index.isdecimal() and int(index) < int(number)):
            raise UsageError(
                f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={number}: "
                "both must be whole numbers, the first below the second"
            )
        if not re.fullmatch(r".+:\d+", address):
            raise UsageError(f"JAX_COORDINATOR_ADDRESS={address} must be host:port of process 0")
        # Without detection, or a launcher around would choose one device for each process.
        jax.distributed.initialize(
            address, int(number), int(index), cluster_detection_method="deactivate"
        )
    elif launchers := [name for name in LAUNCHERS if os.environ.get(name, "1") != "1"]:
        try:
            jax.distributed.initialize()
        except (ValueError, KeyError) as error:  # what its detection lacks in the environment
            variable = launchers[0]
            raise UsageError(
                f"{variable}={os.environ[variable]} tells of several processes, but JAX cannot "
                f"find them ({error}): start them through srun or Open MPI 4's mpirun, set "
                f"{', '.join(EXPLICIT)} for each, or unset {variable} for a run of one process"
            ) from error
