"""Where and when compiled programs are cached."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dino_jax.cache import cache_folder, enable_compilation_cache
from dino_jax.errors import UsageError

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The compilation cache of this test, with JAX configured as outside of tests."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.setenv("DINO_JAX_CACHE", str(tmp_path / "cache"))
    for name, value in zip(SETTINGS, (True, None, 1.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache/compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_cache_folder_belongs_to_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DINO_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dino_jax"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == Path.home() / ".cache/dino_jax"


def test_without_a_home_directory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DINO_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UsageError, match=r"^~/\.cache cannot be resolved.*set DINO_JAX_CACHE"):
        cache_folder()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    enable_compilation_cache()
    assert "compiled programs are not cached: ~/.cache cannot be resolved" in caplog.text


def test_programs_are_cached_in_a_private_folder(folder: Path) -> None:
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert mode(folder) == mode(folder.parent) == 0o700


def compiled(offset: float) -> jax.Array:
    """Compiles a program and returns its result."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    return jax.jit(lambda x: jnp.sin(x) + offset)(jnp.ones(3))


def test_damaged_entry_is_compiled_again(folder: Path) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    enable_compilation_cache()
    expected = compiled(2.0)
    (entry,) = folder.glob("jit__lambda*")
    entry.write_bytes(entry.read_bytes()[:-20])  # as after a killed process
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert (compiled(2.0) == expected).all()


def test_user_settings_take_precedence(folder: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert not folder.exists()


def test_the_cache_is_off_by_default_on_cpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINO_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder / "dino_jax/compiled")


def test_several_processes_need_an_explicit_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("DINO_JAX_CACHE")
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("permissions", [0o770, 0o702])
def test_folder_writable_by_others_is_not_used(
    permissions: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.chmod(permissions)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert f"{folder} is writable by other users (chmod 700 {folder}" in caplog.text
    assert "set DINO_JAX_CACHE to another folder" in caplog.text


def test_folder_of_another_user_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert f"compiled programs are not cached: {folder} belongs to another user" in caplog.text


def test_warns_if_the_folder_cannot_be_created(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.touch()
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled programs are not cached" in caplog.text
    assert "Not a directory" in caplog.text
