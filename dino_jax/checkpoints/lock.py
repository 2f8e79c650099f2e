"""A lock on a run's folder; the system lets go of it when the process ends, however it ends."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from dino_jax.errors import UsageError

NAME = ".lock"


def take(workdir: Path) -> TextIO:
    """Locks a folder until the file that is returned is closed.

    On a file system without locks this does nothing.

    Args:
      workdir: the folder.
    Raises:
      UsageError: another process holds the lock.
      OSError: the folder cannot be written.
    """
    file = (workdir / NAME).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise UsageError(
            f"workdir={workdir} is in use by {holder}: wait for its end, stop it, or choose "
            "another folder"
        ) from error
    except OSError:
        pass  # a network's file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
