"""The start of a command: JAX's settings, its devices, and clear errors if there are none."""

import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dino_jax.cache import enable_compilation_cache
from dino_jax.errors import UsageError

# JAX's settings that change results or break the program, and the values that it needs.
NEEDED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_debug_key_reuse": False,
    "jax_transfer_guard": None,
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_no_tracing": False,
    "jax_no_execution": False,
}
GPU_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm60-plugin", "jax-rocm7-plugin")
NVIDIA_DEVICE = Path("/dev/nvidia0")
INSTALL_CUDA = 'pip install "dino_jax[cuda12]", or "dino_jax[cuda13]" for CUDA 13'
log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # the devices are always logged


def _others() -> Iterator[tuple[str, Any]]:
    """Settings with another value than needed; resetting one may reset others."""
    import jax

    for name, need in NEEDED.items():
        value = getattr(jax.config, name, need)  # not every version of JAX has all settings
        if value != need:
            yield name, value


def reset_jax_settings() -> None:
    """Resets the settings of a command, and warns about those that the user had changed.

    Raises:
      UsageError: JAX cannot be imported because an environment variable is invalid.
    """
    try:
        import jax
    except ValueError as error:
        raise UsageError(f"JAX rejects an environment variable ({error}): unset it") from error

    for name, value in _others():
        logging.warning("%s=%s is ignored: dino_jax needs %s", name.upper(), value, NEEDED[name])
        jax.config.update(name, NEEDED[name])


def check_jax_settings() -> None:
    """Rejects settings of the calling program under which a library function would fail.

    Raises:
      UsageError: JAX has another setting than needed.
    """
    for name, value in _others():
        raise UsageError(
            f"{name}={value} is not supported: call jax.config.update({name!r}, {NEEDED[name]!r}), "
            f"or unset {name.upper()}"
        )


def start(*, computes: bool = True) -> None:
    """Prepares processes, devices and the compilation cache, after `reset_jax_settings`.

    Args:
      computes: whether the command uses the devices. Others run on the CPU, so that they need no
        plugin and do not reserve the memory of a GPU.
    Raises:
      UsageError: the devices that the user selected are missing, or processes cannot be set up.
    """
    import jax

    from dino_jax.distributed import initialize_if_launched  # imports JAX

    if not computes:
        jax.config.update("jax_platforms", "cpu")
    initialize_if_launched()
    if not computes:
        return
    reasons = check_devices()
    if jax.process_index() == 0:
        log.info("devices: %s", describe_devices())
        _explain_cpu(reasons)
    enable_compilation_cache()


class _PluginErrors(logging.Filter):
    """Takes errors of JAX's plugins, which JAX logs with long tracebacks, out of its log."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            kind, error, _ = record.exc_info
            self.reasons.append(str(error).partition("\n")[0] or kind.__name__)
        return not record.exc_info


def check_devices() -> list[str]:
    """Initializes JAX's devices.

    Returns: why plugins of JAX cannot be used, one line each.
    Raises:
      UsageError: there are no devices of the kind that the user selected.
    """
    import jax

    plugins, logger = _PluginErrors(), logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(plugins)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a GPU has been found
        reason = re.split(r"\n| \((?:you may need|set JAX_)", str(error))[0]
        because = _because([*plugins.reasons, reason])
        variable, platforms = "JAX_PLATFORMS", jax.config.jax_platforms
        if "Unknown backend" in str(error) and (name := os.environ.get("JAX_PLATFORM_NAME")):
            variable, platforms = "JAX_PLATFORM_NAME", name  # an older variable
        if not platforms:
            raise UsageError(
                f"JAX cannot initialize its devices{because}: set JAX_PLATFORMS=cpu to use the CPU"
            ) from error
        raise UsageError(
            f"{variable}={shlex.quote(platforms)} is not available on this machine{because}: "
            f"{_remedy(platforms.split(','))}, or unset {variable}"
        ) from error
    finally:
        logger.removeFilter(plugins)
    return plugins.reasons


def _because(reasons: list[str]) -> str:
    return f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""


def _remedy(platforms: list[str]) -> str:
    if "cuda" in platforms or "gpu" in platforms:
        if _gpus_are_hidden():
            return "unset CUDA_VISIBLE_DEVICES, which hides all GPUs"
        if plugins := installed_gpu_plugins():
            return (
                f"check the driver with nvidia-smi, and that {plugins} fits jax {_version('jax')}"
            )
        return f"install JAX's plugin ({INSTALL_CUDA})"
    if "tpu" in platforms:
        return 'install JAX\'s plugin (pip install "dino_jax[tpu]")'
    return "choose cpu, cuda or tpu"


def describe_devices() -> str:
    """Number and kind of all devices: "8 x cpu", "1 x NVIDIA H200"."""
    import jax

    counts = Counter(device.device_kind for device in jax.devices())
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())


def _explain_cpu(reasons: list[str]) -> None:
    """Logs why JAX uses the CPU, if the user or the machine seems to want a GPU."""
    import jax

    platforms = jax.config.jax_platforms
    if jax.default_backend() != "cpu":
        return
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):  # a choice of the user
        return
    if plugins := installed_gpu_plugins():
        seen = f"{plugins} is installed{_because(reasons)}"
    elif NVIDIA_DEVICE.exists():
        seen = "this machine has an NVIDIA GPU"
    elif platforms:  # cuda,cpu: the CPU as a fallback
        seen = f"JAX_PLATFORMS={platforms}"
    else:
        return
    if _gpus_are_hidden():
        log.info("CUDA_VISIBLE_DEVICES hides all GPUs, so the CPU is used")
        return
    log.warning(
        "NO GPU IS USED although %s: the CPU is much slower; %s, or set JAX_PLATFORMS=cpu to use "
        "the CPU without this warning",
        seen,
        _remedy(["cuda"]),
    )


def _gpus_are_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def installed_gpu_plugins() -> str:
    """JAX's GPU plugins that are installed, with their versions; empty if there are none."""
    versions = {name: _version(name) for name in GPU_PLUGINS}
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
