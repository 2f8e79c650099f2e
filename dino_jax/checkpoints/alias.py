"""Paths that Orbax and TensorStore read as written."""

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

_PLAIN = re.compile(r"[\w /.,@+=-]*")


@cache
def plain_path(folder: Path) -> Path:
    """A path of an absolute folder without characters that Orbax or TensorStore misread.

    Orbax passes paths to `glob` without escaping them, so a `[` hides the files of a checkpoint,
    and TensorStore only accepts UTF-8. For a folder with an unusual path this returns a symbolic
    link with the same name as the folder, in a private folder that is deleted at exit. Other paths
    are returned unchanged. Hosts may have different links, because Orbax shares only names.

    Args:
      folder: an absolute path; its last component must be plain.
    """
    if _PLAIN.fullmatch(str(folder)):
        return folder
    link = Path(tempfile.mkdtemp(prefix="dino_jax_")) / folder.name
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    link.symlink_to(folder, target_is_directory=True)
    return link
