"""Paths that Orbax and TensorStore read as written."""

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

_PLAIN = re.compile(r"[\w /.,@+=-]*")


def plain_path(folder: Path) -> Path:
    """A path of an absolute folder without characters that Orbax or TensorStore misread.

    Orbax passes paths to `glob` without escaping them, so a `[` hides the files of a checkpoint,
    and TensorStore only accepts UTF-8. For a folder with an unusual path this returns a symbolic
    link with the same name as the folder, in a private folder that is deleted at exit. Other paths
    are returned unchanged. Hosts may have different links, because Orbax shares only names. Calling
    this again restores a link that was removed, for example by a cleaner of temporary files.

    Args:
      folder: an absolute path; its last component must be plain.
    """
    if _PLAIN.fullmatch(str(folder)):
        return folder
    link = _private_folder(folder) / folder.name
    if not link.is_symlink():
        link.parent.mkdir(mode=0o700, exist_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    return link


@cache
def _private_folder(folder: Path) -> Path:
    """The folder of a link, which is deleted at exit."""
    where = tempfile.gettempdir()  # a scheduler may set it to a folder with unusual characters
    private = tempfile.mkdtemp(prefix="dino_jax_", dir=where if _PLAIN.fullmatch(where) else "/tmp")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)
