"""Several hosts: joins the other processes of a launcher."""

import os
import re

import jax

from dino_jax.errors import UsageError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize_if_launched() -> None:
    """Calls `jax.distributed.initialize` where a launcher's environment shows several processes.

    Slurm (`srun`) and Open MPI (`mpirun`) are recognised by JAX itself; anything else sets
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without
    them this does nothing. Call it before anything else of JAX.

    Raises:
      UsageError: some of the three variables are set and others are not, or they make no sense.
    """
    given = [name for name in EXPLICIT if name in os.environ]
    if given and len(given) < len(EXPLICIT):
        missing = ", ".join(name for name in EXPLICIT if name not in os.environ)
        raise UsageError(f"{', '.join(given)} is set without {missing}: set all three or none")
    if given:
        address, number, index = (os.environ[name] for name in EXPLICIT)
        if not (number.isdigit() and index.isdigit() and int(index) < int(number)):
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
    elif any(
        int(os.environ.get(name, "1")) > 1
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    ):
        jax.distributed.initialize()
