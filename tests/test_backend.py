"""The start of commands: JAX's settings and devices."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dino_jax
from dino_jax import backend, cli, train
from dino_jax.errors import UsageError
from tests.support import runs
from tests.support.scripts import run_script

SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_debug_key_reuse": True,
    "jax_transfer_guard": "disallow",
    "jax_transfer_guard_device_to_host": "disallow",
    "jax_no_tracing": True,
    "jax_no_execution": True,
}


@pytest.fixture(autouse=True)
def platforms() -> Iterator[None]:
    before = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", before)


@pytest.fixture(params=SETTINGS.items(), ids=lambda item: item[0])
def changed(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A setting of JAX that is changed during the test."""
    name, value = request.param
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    yield name, value
    jax.config.update(name, before)


def test_commands_reset_settings(
    changed: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    name, value = changed
    backend.reset_jax_settings()
    assert getattr(jax.config, name) == backend.NEEDED[name]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name.upper()}={value} is ignored: dino_jax needs ")
    backend.check_jax_settings()


def test_runs_reject_settings_of_the_calling_program(
    changed: tuple[str, Any], tmp_path: Path
) -> None:
    name, value = changed
    message = rf"^{name}={value} is not supported: call jax.config.update\(.{name}., "
    with pytest.raises(UsageError, match=message):
        train.run(runs.tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_load_alike_with_64_bits(weights: str) -> None:
    _, expected = dino_jax.load(weights)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        model, info = dino_jax.load(weights)
        features = nnx.eval_shape(lambda: model(jnp.zeros((1, 32, 32, 3), jnp.float32)))
    assert features.dtype == jnp.float32
    assert info == expected  # including the hash of the arrays


def fails_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", devices)


def has_plugin(monkeypatch: pytest.MonkeyPatch, number: str | None = "0.10.2") -> None:
    monkeypatch.setattr(
        backend, "_version", lambda name: number if name in ("jax", "jax-cuda12-plugin") else None
    )


CUDA_FAILS = "Unable to initialize backend 'cuda': no device (you may need to uninstall it)\nmore"


@pytest.mark.parametrize(
    ("platform", "error", "message"),
    [
        ("cuda", AssertionError(), 'machine: install .* .pip install "dino_jax.cuda12.", or .*13'),
        ("gpu", AssertionError(), 'machine: install .* .pip install "dino_jax.cuda12."'),
        ("cpu,cuda", RuntimeError("x"), r"machine \(x\): install"),
        ("tpu", RuntimeError("no libtpu"), r"\(no libtpu\): install .* \"dino_jax.tpu.\""),
        (
            "foo",
            RuntimeError("a (set JAX_PLATFORMS='')"),
            r"\(a\): choose cpu, cuda or tpu, or",
        ),
        ("rocm", RuntimeError("a"), "choose cpu, cuda or tpu, or unset JAX_PLATFORMS"),
        (
            None,
            RuntimeError("a"),
            r"JAX cannot initialize its devices \(a\): set JAX_PLATF",
        ),
    ],
)
def test_missing_backend(
    platform: str | None, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(error, monkeypatch)
    has_plugin(monkeypatch, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jax.config.update("jax_platforms", platform)
    prefix = f"JAX_PLATFORMS={platform} is not available on this .*" if platform else ""
    with pytest.raises(UsageError, match=prefix + message):
        backend.check_devices()


@pytest.mark.parametrize(
    ("platforms", "name", "error", "message"),
    [
        ("cpu", "gpu", "Unknown backend: 'gpu'", "JAX_PLATFORM_NAME=gpu .* install"),
        (None, "foo", "Unknown backend foo", "JAX_PLATFORM_NAME=foo .*: choose cpu, cuda or"),
        ("foo", "cpu", "Unable to initialize backend 'foo'", "JAX_PLATFORMS=foo "),
        (" cpu", "", "Unable to initialize backend ' cpu'", "JAX_PLATFORMS=' cpu' is not"),
    ],
)
def test_names_the_variable_that_selects_the_backend(
    platforms: str | None,
    name: str,
    error: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails_with(RuntimeError(error), monkeypatch)
    has_plugin(monkeypatch, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jax.config.update("jax_platforms", platforms)
    monkeypatch.setenv("JAX_PLATFORM_NAME", name)
    with pytest.raises(UsageError, match=f"^{message}"):
        backend.check_devices()


@pytest.mark.parametrize("hidden", [None, "", "-1"])
def test_plugin_that_fails(hidden: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(RuntimeError(CUDA_FAILS), monkeypatch)
    has_plugin(monkeypatch)
    jax.config.update("jax_platforms", "cuda")
    message = "check the driver with nvidia-smi, and that jax-cuda12-plugin 0.10.2 fits jax 0.10.2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        message = "unset CUDA_VISIBLE_DEVICES, which hides all GPUs"
    with pytest.raises(UsageError, match=rf"'cuda': no device\): {message}, or unset JAX_PLATF"):
        backend.check_devices()


@pytest.mark.parametrize("platform", ["cuda", None])
def test_plugin_whose_error_jax_logs(
    platform: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """JAX logs a traceback of many lines; one line of ours has the reason."""
    has_plugin(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpus, jax_log = jax.devices(), logging.getLogger("jax._src.xla_bridge")
    errors = iter([RuntimeError("Unable to load CUDA. Is it installed?\nmore")])

    def devices() -> list[jax.Device]:
        for error in errors:  # plugins are found once
            jax_log.error("Jax plugin configuration error", exc_info=error)
        if platform:
            raise AssertionError
        return cpus

    monkeypatch.setattr(jax, "devices", devices)
    jax.config.update("jax_platforms", platform)
    remedy = "check the driver with nvidia-smi, and that jax-cuda12-plugin 0.10.2 fits jax 0.10.2"
    if platform:
        with pytest.raises(UsageError) as raised:
            backend.check_devices()
        assert str(raised.value) == (
            "JAX_PLATFORMS=cuda is not available on this machine (Unable to load CUDA. Is it "
            f"installed?): {remedy}, or unset JAX_PLATFORMS"
        )
        assert not caplog.records
    else:
        _, (level, text) = started(caplog)
        assert level == logging.WARNING
        assert text.startswith(
            "NO GPU IS USED although jax-cuda12-plugin 0.10.2 is installed (Unable to load CUDA. "
            f"Is it installed?): the CPU is much slower; {remedy}, or set JAX_PLATFORMS=cpu "
        )
    assert not jax_log.filters


def started(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """What the start of a command logs, with levels."""
    caplog.clear()
    backend.start()
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_logs_devices_and_falling_back_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices = (logging.INFO, "devices: 8 x cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    has_plugin(monkeypatch)
    assert started(caplog) == [devices]  # JAX_PLATFORMS=cpu, as the tests set it
    jax.config.update("jax_platforms", None)
    first, (level, text) = started(caplog)
    assert (first, level) == (devices, logging.WARNING)
    assert text.startswith("NO GPU IS USED although jax-cuda12-plugin 0.10.2 is installed: ")
    has_plugin(monkeypatch, None)
    monkeypatch.setattr(backend, "NVIDIA_DEVICE", Path("/dev/null"))
    _, (level, text) = started(caplog)
    assert text.startswith("NO GPU IS USED although this machine has an NVIDIA GPU: ")
    assert 'pip install "dino_jax[cuda12]"' in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert started(caplog)[1] == (
        logging.INFO,
        "CUDA_VISIBLE_DEVICES hides all GPUs, so the CPU is used",
    )
    monkeypatch.setattr(backend, "NVIDIA_DEVICE", Path("/not/there"))
    assert started(caplog) == [devices]
    # With a fallback of the user, JAX logs nothing.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for platforms in ("cuda,cpu", "gpu,cpu"):
        jax.config.update("jax_platforms", platforms)
        _, (level, text) = started(caplog)
        assert level == logging.WARNING
        assert text.startswith(f"NO GPU IS USED although JAX_PLATFORMS={platforms}: ")
        assert 'pip install "dino_jax[cuda12]"' in text


@pytest.mark.parametrize("command", ["train", "knn", "linear", "attention", "embed"])
def test_commands_start_with_the_devices(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_with(AssertionError(), monkeypatch)
    jax.config.update("jax_platforms", "cuda")
    words = {
        "train": f"--config {runs.CONFIG} --workdir /not/there",
        "attention": "--weights=w --image=d --output=/not/there",
        "embed": "--weights=w --data=d --output=/not/there.npy",
    }.get(command, "--weights=w --train=d --test=d")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *words.split()])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: JAX_PLATFORMS=cuda is not available on this machine: ")


@pytest.mark.parametrize(
    ("environment", "words", "code", "output"),
    [
        ({"JAX_PLATFORMS": "foo"}, "knn --weights=w --train=d --test=d", 2, "choose cpu, cuda or"),
        ({"JAX_ENABLE_X64": "maybe"}, "knn --help", 2, "error: JAX rejects an environment variab"),
        # Commands that do not compute need no devices.
        (
            {"JAX_PLATFORMS": "foo", "JAX_ENABLE_X64": "1"},
            f"inspect {runs.ROOT}/tests/goldens/pth/backbone.pth",
            0,
            "JAX_ENABLE_X64=True is ignored",
        ),
    ],
)
def test_processes(environment: dict[str, str], words: str, code: int, output: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dino_jax", *words.split()],
        cwd=runs.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert output in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["main.py", "convert_torch_weights.py"])
def test_scripts_find_the_package_without_their_folder_on_the_path(script: str) -> None:
    """As with `python -P`, `-I` and PYTHONSAFEPATH=1."""
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{runs.ROOT / script}", run_name="__main__")
except SystemExit:
    import dino_jax
    assert dino_jax.__file__ == "{runs.ROOT / "dino_jax/__init__.py"}", dino_jax.__file__
"""
    returncode, stdout, stderr = run_script(code, "-I")
    assert returncode == 0, stderr
    assert "usage" in stdout
