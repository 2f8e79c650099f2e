"""Several processes: how they find each other, and that they train like a single process."""

import shutil
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from dino_jax import distributed
from dino_jax.distributed import EXPLICIT, LAUNCHERS, initialize_if_launched
from dino_jax.errors import UsageError
from tests.support import runs


@pytest.fixture
def initialize(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Replaces `jax.distributed.initialize`, in an environment without a launcher."""
    for name in (*EXPLICIT, *LAUNCHERS, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    initialize = mock.Mock()
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "watch_peers", lambda: None)
    return initialize


def test_without_a_launcher(initialize: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize_if_launched()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    initialize_if_launched()
    initialize.assert_not_called()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_jax_detects_known_launchers(
    name: str, initialize: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    initialize_if_launched()
    initialize.assert_called_once_with()


def test_rejects_launchers_of_pytorch(
    initialize: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    initialize_if_launched()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"^WORLD_SIZE=4 and RANK=0 come .* torchrun.* use srun"):
        initialize_if_launched()
    initialize.assert_not_called()


def test_rejects_a_launcher_that_jax_cannot_detect(
    initialize: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example Open MPI 5, which no longer gives the address of its first process."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    initialize.side_effect = ValueError("coordinator_address should be defined.")
    with pytest.raises(UsageError, match=r"OMPI_COMM_WORLD_SIZE=2 indicates .*defined.* set JAX_"):
        initialize_if_launched()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", "2", None), "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is set without JAX_PR"),
        ((None, None, "0"), "JAX_PROCESS_ID is set without .* set all three or none"),
        (
            ("host:1", "2", "2"),
            "JAX_PROCESS_ID=2 and JAX_NUM_PROCESSES=2 must .* less than the second",
        ),
        (("host:1", "two", "0"), "must be whole numbers"),
        (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS=host must be host:port of"),
    ],
)
def test_rejects_invalid_variables(
    values: tuple[str | None, ...],
    message: str,
    initialize: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in zip(EXPLICIT, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        initialize_if_launched()
    initialize.assert_not_called()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_close(workdir: Path, expected: Path) -> None:
    for name in ("log.txt", "metrics.jsonl"):
        ours, theirs = runs.records(workdir, name), runs.records(expected, name)
        assert [record.keys() for record in ours] == [record.keys() for record in theirs]
        for our, their in zip(ours, theirs, strict=True):
            for key in their:
                if key == "health":
                    assert our[key] == their[key]
                else:
                    np.testing.assert_allclose(our[key], their[key], 1e-5, 1e-5, err_msg=key)


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    settings = runs.arguments(eval__knn_every_epochs=1, checkpoint__every_steps=2)
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                runs.started(
                    workdir,
                    *settings,
                    devices=4,
                    JAX_COORDINATOR_ADDRESS=address,
                    JAX_NUM_PROCESSES="2",
                    JAX_PROCESS_ID=str(index),
                )
            )
            for index in range(2)
        ]
        runs.wait_until((workdir / "checkpoints" / "6").exists, processes[0])
        # A signal to one process stops both after the same step.
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    stopped = runs.steps(workdir)[-1]
    assert 6 < stopped < runs.TOTAL_STEPS
    assert "epoch 1 finished" in outputs[0]
    assert "epoch 1 finished" not in outputs[1]  # only the first process writes

    # A single process resumes the checkpoint of two and finishes the run.
    assert runs.train_here(
        runs.tiny_config(eval__knn_every_epochs=1),
        shutil.copytree(workdir, tmp_path / "one"),
        devices=8,
    )["finished"]
    assert_close(tmp_path / "one", runs.scored())
