"""The user's folder for what can be had again: downloaded weights and compiled programs."""

import logging
import os
import stat
from pathlib import Path

from dino_jax.errors import UsageError


def cache_folder() -> Path:
    """`$DINO_JAX_CACHE`, else `dino_jax` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
      UsageError: neither is set, and the user has no home directory.
    """
    if named := os.environ.get("DINO_JAX_CACHE"):
        return Path(os.path.expanduser(named)).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path there is to be ignored (XDG base directory specification).
    if not base.is_absolute():
        base = Path(os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise UsageError(f"{base} is in no home directory: let DINO_JAX_CACHE name a folder")
    return base / "dino_jax"


def make_private(folder: Path) -> None:
    """Makes a folder of the cache that only its user can enter, if it is missing.

    Raises:
      OSError: it cannot be made.
    """
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in `compiled` of the cache folder, for the runs to come.

    Call it after `jax.distributed.initialize` and before anything compiles. A folder that the user
    has given JAX (`JAX_COMPILATION_CACHE_DIR`) stays, and `JAX_ENABLE_COMPILATION_CACHE=false`
    switches every such cache off. An entry that JAX cannot read is compiled again, with a warning.

    What lies there is executed, so a folder that others can write to is not used; a warning says
    why. Without `DINO_JAX_CACHE` nothing is kept

    * of a run of several processes: the first one writes and all read, so the folder must lie on a
      file system that all of them share, which a home directory need not;
    * on a CPU: programs are made for one kind of CPU, and JAX 0.10 takes some kinds for others,
      compiles again and says so at length.
    """
    import jax  # here: --help and downloads do without

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
            "compiled programs are not kept: %s; DINO_JAX_CACHE names another folder", problem
        )
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _problem(folder: Path) -> str:
    """Why programs in a folder cannot be trusted; empty if they can."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"{folder} can be written to by other users (chmod 700 {folder} if all in it is yours)"
        )
    return ""
