"""Photographs from packages of the `test` extra."""

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

FILES = {
    "skimage": (
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "coins.png"),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
LONGER_SIDE = 240  # pixels, large enough for the tests


@functools.cache
def photographs() -> dict[str, Image.Image]:
    """Eight small photographs by name; skips the test if a package is missing."""
    found = {}
    for package, (folder, names) in FILES.items():
        spec = find_spec(package)
        if spec is None:
            pytest.skip(f"{package} with its photographs is not installed: pip install .[test]")
        for name in names:
            with Image.open(Path(spec.origin).parent / folder / name) as image:
                image = image.convert("RGB")
                image.thumbnail((LONGER_SIDE, LONGER_SIDE))
                found[Path(name).stem] = image
    return found
