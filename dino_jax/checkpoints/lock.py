"""File locks, which the operating system releases when their process ends, however it ends."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from dino_jax.errors import UsageError

NAME = ".lock"


def take(workdir: Path) -> TextIO:
    """Locks the folder of a run until the returned file is closed.

    Raises:
      UsageError: another process holds the lock.
      OSError: the folder cannot be written.
    """
    try:
        return _lock(workdir / NAME, wait=False)
    except BlockingIOError as error:
        raise UsageError(
            f"workdir={workdir} is in use by {error}: wait until it ends, stop it, or choose "
            "another folder"
        ) from error


def wait_for(path: Path) -> TextIO:
    """Locks the file `path` until the returned file is closed, after waiting for other processes.

    Raises:
      OSError: the file cannot be written.
    """
    try:
        return _lock(path, wait=False)
    except BlockingIOError as error:
        logging.warning("%s is locked by %s; waiting", path, error)
        return _lock(path, wait=True)


def _lock(path: Path, *, wait: bool) -> TextIO:
    """Locks a file and writes into it who did.

    On file systems without locks, as some network file systems are, this locks nothing.

    Raises:
      BlockingIOError: another process holds the lock; the error's text names it.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise BlockingIOError(holder) from error
    except OSError:
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
