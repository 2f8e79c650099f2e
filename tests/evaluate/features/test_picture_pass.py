"""Passes over pictures of several shapes: each is computed once and in order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dino_jax import sharding
from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records
from dino_jax.data.sources.files import Files
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.picture_pass import (
    Group,
    PicturePass,
    in_place,
    picture_sizes,
)

COUNT = 13


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Alternately wide and high pictures of a single grey level; two are damaged."""
    root = tmp_path_factory.mktemp("pictures")
    paths = [root / f"{i:02}.png" for i in range(COUNT)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20 + i, 10) if i % 2 else (10, 12), (i, i, i)).save(path)
    for i in (4, 12):
        paths[i].write_text("no picture")
    return Files("pictures", paths)


def level_and_size(model: nnx.Module, canvas: jax.Array, size: jax.Array) -> jax.Array:
    """The first pixel, the sum of all pixels and the size, [B, 4]."""
    whole = canvas.astype(jnp.float32).sum((1, 2, 3))
    return jnp.stack([canvas[:, 0, 0, 0], whole, *size.T], axis=1).astype(jnp.float32)


def wide(model: nnx.Module, canvas: jax.Array, size: jax.Array) -> jax.Array:
    """Returns the same as `level_and_size`, but is another function, for another group."""
    return level_and_size(model, canvas, size)


def picture_pass(goldens: Path, devices: int, options: PassOptions) -> PicturePass:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    with mock.patch.object(sharding, "make_mesh", return_value=mesh):
        return PicturePass(PlacedBackbone(str(goldens / "pth/backbone.pth"), options))


@pytest.mark.parametrize(("devices", "batch_size", "threads"), [(8, 16, 3), (1, 2, 1), (2, 100, 2)])
def test_every_picture_is_computed_in_order(
    devices: int, batch_size: int, threads: int, goldens: Path, files: Files
) -> None:
    options = PassOptions(batch_size=batch_size, num_threads=threads)
    records = Records(files)
    groups: list[tuple[Callable, Group]] = [
        (wide, Group(range(1, COUNT, 2), (10, 40))),
        (
            level_and_size,
            Group(range(0, COUNT - 3, 2), (12, 10)),
        ),  # the last picture is in no group
    ]
    found = picture_pass(goldens, devices, options).features(records, decode, groups)
    rows, readable = in_place(found, COUNT)
    assert np.flatnonzero(~readable).tolist() == [4, 10, 12]
    assert records.num_unreadable == 1
    for i in range(COUNT):
        height, width = (10, 20 + i) if i % 2 else (12, 10)
        expected = [i, 3 * i * height * width, height, width] if readable[i] else [0] * 4
        assert rows[i].tolist() == expected


def test_batches_are_in_order_with_padding_last(goldens: Path, files: Files) -> None:
    passes = picture_pass(goldens, 8, PassOptions(batch_size=3, num_threads=2))
    group = Group(range(COUNT), (12, 40))
    batches = [
        jax.device_get(batch)
        for batch in passes.stream(level_and_size, Records(files), decode, group)
    ]
    assert [batch["rows"].shape for batch in batches] == [(8, 4)] * 2  # one picture per device
    index = np.concatenate([batch["index"] for batch in batches])
    assert index.tolist() == [*range(COUNT), -1, -1, -1]
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.flatnonzero(~valid).tolist() == [4, 12, 13, 14, 15]


def test_rejects_features_that_are_not_finite(goldens: Path, files: Files) -> None:
    """Checked for every job, but not for padding and unreadable pictures."""

    def broken(model: nnx.Module, canvas: jax.Array, size: jax.Array) -> jax.Array:
        rows = level_and_size(model, canvas, size)
        return jnp.where(jnp.isin(rows[:, :1], jnp.array([0, 7])), jnp.nan, rows)

    passes = picture_pass(goldens, 8, PassOptions(batch_size=3, num_threads=2))
    few, more = ([(broken, Group(range(1, end), (12, 40)))] for end in (7, 9))
    assert passes.features(Records(files), decode, few).index.tolist() == [1, 2, 3, 5, 6]
    with pytest.raises(UsageError, match=r"features of .*07\.png contain a value that is not"):
        passes.features(Records(files), decode, more)


def test_no_readable_picture(goldens: Path, files: Files) -> None:
    passes = picture_pass(goldens, 1, PassOptions(num_threads=1))
    groups = [(level_and_size, Group([4, 12], (12, 10)))]
    with pytest.raises(UsageError, match="none of the 13 images of pictures can be read: see"):
        passes.features(Records(files), decode, groups)


def test_frames_are_in_order_for_any_batch_size(goldens: Path) -> None:
    frames = [np.full((12, 10, 3), i, np.uint8) for i in range(11)]
    for devices, batch_size in ((8, 3), (1, 4), (2, 100)):
        passes = picture_pass(goldens, devices, PassOptions())
        rows = list(passes.stream_frames(level_and_size, iter(frames), batch_size))
        assert [row.tolist() for row in rows] == [[i, 360 * i, 12, 10] for i in range(11)]

    def broken(model: nnx.Module, canvas: jax.Array, size: jax.Array) -> jax.Array:
        return jnp.where(canvas[:, 0, 0, :1] == 7, jnp.nan, 1.0)

    with pytest.raises(UsageError, match="features of frame 7 contain a value that is not finite"):
        list(passes.stream_frames(broken, iter(frames), 4))


def test_picture_sizes_skip_files_without_a_header(files: Files) -> None:
    sizes = picture_sizes(Records(files), num_threads=2)
    assert sizes == {
        i: (10, 20 + i) if i % 2 else (12, 10) for i in range(COUNT) if i not in (4, 12)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
        ({"max_unreadable": -1.0}, "max_unreadable=-1.0 must be between 0 and 1"),
        ({"max_unreadable": float("nan")}, "max_unreadable=nan must be between 0 and 1"),
        ({"max_unreadable": 1.5}, "max_unreadable=1.5 must be between 0 and 1"),
    ],
)
def test_rejects_options_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PassOptions(**change)
    assert PassOptions(max_unreadable=0.0).max_unreadable == 0
