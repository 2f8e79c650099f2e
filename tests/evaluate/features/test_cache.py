"""The on-disk cache of features."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_jax.data.sources import open_source
from dino_jax.data.sources.idx import IdxSource
from dino_jax.errors import UsageError
from dino_jax.evaluate.features import cache
from dino_jax.evaluate.features.square_pass import Features

ABOUT = {
    "weights": 32 * "ab",
    "feature": "ClassToken()",
    "transform": {"crop": 16},
    "data": {"spec": "shapes:5", "images": 5},
}
FEATURES = Features(
    np.arange(15, dtype=np.float32).reshape(5, 3), np.arange(5), np.array([0, 1, 2, 4, 5])
)


def test_entries_are_read_back(tmp_path: Path) -> None:
    store = tmp_path / "new" / "store"
    cache.write_entry(store, ABOUT, Features(*(np.zeros(2) for _ in FEATURES)))
    cache.write_entry(store, ABOUT, FEATURES)  # replaces it
    for found, saved in zip(cache.read_entry(store, ABOUT), FEATURES, strict=True):
        np.testing.assert_array_equal(found, saved)
        assert found.dtype == saved.dtype
    assert [path.name for path in store.iterdir()] == [cache.entry_of(store, ABOUT).name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": 32 * "cd"},
            r"do not match: weights abababababab\.\.\. instead of cdcdcdcdcdcd",
        ),
        ({"transform": {"crop": 32}}, "transform crop=16 instead of crop=32"),
        ({"feature": "ClassTokens(4)"}, r"feature ClassToken\(\) instead of ClassTokens\(4\)"),
        ({"data": {"spec": "shapes:5", "images": 6}}, "images=5 instead of .*images=6"),
        (
            {"data": {"spec": "shapes:7", "images": 7}},
            "no features of shapes:7, only of shapes:5",
        ),
    ],
)
def test_rejects_other_features(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    cache.write_entry(tmp_path, ABOUT, FEATURES)
    with pytest.raises(UsageError, match=message):
        cache.read_entry(tmp_path, ABOUT | change)


def test_spelling_of_a_source_does_not_matter(tmp_path: Path) -> None:
    """It affects neither the look-up nor the message about other entries."""
    here, there = (
        ABOUT | {"data": {"spec": spec, "images": 5, "listing": "ef"}} for spec in ("x/", "/a/x")
    )
    cache.write_entry(tmp_path, here, FEATURES)
    np.testing.assert_array_equal(cache.read_entry(tmp_path, there).index, FEATURES.index)
    with pytest.raises(UsageError, match=r"of /a/x .* do not match: feature [^;]+$"):
        cache.read_entry(tmp_path, there | {"feature": "ClassTokens(4)"})


def test_missing_and_damaged_entries(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder: compute them with --save-features"):
        cache.read_entry(tmp_path / "nowhere", ABOUT)
    cache.write_entry(tmp_path, ABOUT, FEATURES)
    file = cache.entry_of(tmp_path, ABOUT) / "features.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UsageError, match="are damaged: remove that folder"):
        cache.read_entry(tmp_path, ABOUT)
    np.save(file, FEATURES.features[:4])
    with pytest.raises(UsageError, match="are damaged: remove that folder"):
        cache.read_entry(tmp_path, ABOUT)
    np.save(file, np.float32(1))
    with pytest.raises(UsageError, match="are damaged: remove that folder"):
        cache.read_entry(tmp_path, ABOUT)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be saved in"):
        cache.write_entry(tmp_path / "file", ABOUT, FEATURES)


@pytest.mark.parametrize(("place", "bit"), [(8, 6), (21, 4)])
def test_damaged_header(place: int, bit: int, tmp_path: Path) -> None:
    """NumPy parses the header as Python; it gets an invalid token or invalid syntax."""
    cache.write_entry(tmp_path, ABOUT, FEATURES)
    file = cache.entry_of(tmp_path, ABOUT) / "features.npy"
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(UsageError, match="are damaged: remove that folder"):
        cache.read_entry(tmp_path, ABOUT)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": 3}', '{"data": {"spec": 7}}', "\xff"])
def test_skips_other_entries(text: str, tmp_path: Path) -> None:
    cache.write_entry(tmp_path, ABOUT, FEATURES)
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "about.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "about.json").write_text('{"data": {"spec": "shapes:5"}}')
    with pytest.raises(UsageError, match=r"do not match: weights abababababab\.\.\. inst"):
        cache.read_entry(tmp_path, ABOUT | {"weights": 32 * "cd"})


def test_sources_are_identified_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, sizes and times count; a relative path depends on the working folder."""

    def listing(spec: str) -> str:
        return cache.describe_data(open_source(spec))["listing"]

    for folder in ("here", "there"):
        (tmp_path / folder / "data").mkdir(parents=True)
        for name in ("a.png", "b.png"):
            (tmp_path / folder / "data" / name).write_text(name)
            os.utime(tmp_path / folder / "data" / name, (7, 7))
    monkeypatch.chdir(tmp_path / "there")
    there = listing("data")
    monkeypatch.chdir(tmp_path / "here")
    seen = [there, listing("data")]
    assert seen[1] == listing("data") == listing(str(tmp_path / "here" / "data"))
    changed = tmp_path / "here" / "data" / "b.png"
    for change in (
        lambda: changed.write_text("larger than before"),
        lambda: os.utime(changed, ns=(7, 8)),
        lambda: changed.rename(changed.with_name("c.png")),
    ):
        change()
        seen.append(listing("data"))
    assert len(set(seen)) == len(seen)
    assert listing("data[1:2]") not in (listing("data[0:1]"), seen[-1])


def test_sources_of_arrays_are_identified_by_content() -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    before = IdxSource(images.copy(), np.arange(3), "idx:x")
    images[2, 1, 1] = 1
    pixels, labels = (
        IdxSource(images, np.arange(3), "idx:x"),
        IdxSource(images, np.ones(3), "idx:x"),
    )
    assert len({cache.describe_data(x)["listing"] for x in (before, pixels, labels)}) == 3
    same = IdxSource(images.copy(), np.arange(3), "idx:x")
    assert cache.describe_data(same) == cache.describe_data(pixels)
