"""Only one process at a time can use a run's folder."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_jax.checkpoints import lock
from dino_jax.errors import UsageError


def test_error_names_the_process(tmp_path: Path) -> None:
    message = rf"workdir={tmp_path} is in use by process {os.getpid()} on .+: wait until it ends"
    with lock.take(tmp_path):
        for _ in range(2):  # a failed attempt changes nothing
            with pytest.raises(UsageError, match=message):
                lock.take(tmp_path)
    lock.take(tmp_path).close()


def test_dead_process_releases_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from dino_jax.checkpoints import lock\n"
        "file = lock.take(pathlib.Path(sys.argv[1])); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == 9
    assert (tmp_path / lock.NAME).read_text().startswith("process ")
    lock.take(tmp_path).close()


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock.take(tmp_path), lock.take(tmp_path):
        pass


def test_unwritable_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock.take(tmp_path / "missing")
