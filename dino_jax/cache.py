"""The user's cache folder: downloaded weights and compiled programs."""

import logging
import os
import stat
from pathlib import Path

from dino_jax.errors import UsageError
from dino_jax.paths import local_path


def cache_folder() -> Path:
    """`$DINO_JAX_CACHE`, else `$XDG_CACHE_HOME/dino_jax`, else `~/.cache/dino_jax`.

    Raises:
      UsageError: neither variable is set, and the user has no home directory.
    """
    if named := os.environ.get("DINO_JAX_CACHE"):
        return local_path(named, "DINO_JAX_CACHE").absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification requires relative paths to be ignored.
    if not base.is_absolute():
        base = Path(os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise UsageError(
            f"{base} cannot be resolved without a home directory: set DINO_JAX_CACHE to a folder"
        )
    return base / "dino_jax"


def make_private(folder: Path) -> None:
    """Creates a folder and its missing parents with access for the current user only.

    Raises:
      OSError: the folder cannot be created.
    """
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache in `compiled` of the cache folder.

    Call this after `jax.distributed.initialize` and before anything compiles. A folder set by the
    user (`JAX_COMPILATION_CACHE_DIR`) takes precedence, and `JAX_ENABLE_COMPILATION_CACHE=false`
    disables the cache. If JAX cannot read an entry, it warns and compiles the program again.

    Cached programs are executed, so a folder that other users can write to is not used; a warning
    gives the reason. Without `DINO_JAX_CACHE` the cache is off

    * in runs of several processes: the first one writes and all read, so the folder must be on a
      shared file system, which the home directory may not be;
    * on CPUs: a program is compiled for one CPU type. JAX 0.10 confuses some types, compiles again
      and logs long warnings.
    """
    import jax  # here, because --help and downloads do not need it

    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    named = "DINO_JAX_CACHE" in os.environ
    if not named and (jax.distributed.is_initialized() or jax.default_backend() == "cpu"):
        return
    try:
        folder = cache_folder() / "compiled"
        make_private(folder)
        problem = _problem(folder)
    except (OSError, UsageError) as error:  # no space, no permission; no home directory
        problem = str(error)
    if problem:
        logging.warning(
            "compiled programs are not cached: %s; set DINO_JAX_CACHE to another folder", problem
        )
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _problem(folder: Path) -> str:
    """Why the programs in a folder cannot be trusted; empty if they can."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"{folder} is writable by other users (chmod 700 {folder} if all its files are yours)"
        )
    return ""
