"""Reading and writing videos with the packaged ffmpeg."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UsageError
from dino_jax.jobs.attention_video import attention_video
from dino_jax.visualize import video
from dino_jax.visualize.video import FPS, check_video_format, open_frames, write_video
from tests.support.moving_square import SHAPE, assert_alike, frames


@pytest.fixture
def ffmpeg() -> None:
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (extra `video`) is not installed")


@pytest.mark.usefixtures("ffmpeg")
@pytest.mark.parametrize("name", ["wander.mp4", "wander.avi", "12:30.mp4", "-a.mp4"])
def test_h264_is_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    write_video(path, frames(), 12.5)
    found = open_frames(path)
    assert found.fps == 12.5
    for _ in range(2):  # every iteration starts from the beginning
        for ours, expected in zip(found, frames(), strict=True):
            assert ours.shape == SHAPE
            assert_alike(ours, expected)
    content = path.read_bytes()
    assert b"avc1" in content or b"H264" in content


@pytest.mark.usefixtures("ffmpeg")
@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_failure_keeps_the_earlier_video(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"wander{ending}"
    path.write_text("earlier")
    with pytest.raises(ZeroDivisionError):
        write_video(path, (frame // (i < 4 or 1 // 0) for i, frame in enumerate(frames())), 5)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "earlier"}


@pytest.mark.usefixtures("ffmpeg")
def test_odd_sides_are_padded_by_one_pixel(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    write_video(path, (frame[:47, :63] for frame in frames()), 5)
    first = next(iter(open_frames(path)))
    assert first.shape == SHAPE
    assert_alike(first[:47, :63], next(frames())[:47, :63])


def test_gif_needs_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_ffmpeg", lambda: 1 / 0)
    path = tmp_path / "wander.gif"
    check_video_format(path)
    write_video(path, frames(), 10)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (6, 100, 0)
        gif.seek(4)
        assert_alike(np.asarray(gif.convert("RGB")), list(frames())[4])


@pytest.mark.parametrize("fps", [7, 12.5, 24, 30, 30000 / 1001, 50])
def test_gif_has_the_right_speed(fps: float, tmp_path: Path) -> None:
    """Durations are rounded to hundredths of a second, and rounding errors do not add up."""
    path, shown = tmp_path / "noise.gif", 0
    write_video(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), fps)
    with Image.open(path) as gif:
        assert gif.n_frames == 40
        for i in range(gif.n_frames):
            gif.seek(i)
            assert gif.info["duration"] >= 20
            shown += gif.info["duration"]
            assert shown == pytest.approx(1000 * (i + 1) / fps, abs=5)


def test_frames_in_a_folder_are_sorted_by_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in (1, 2, 9, 10, 100):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "frame11.png").write_text("broken")
    found = open_frames(tmp_path)
    assert found.fps == FPS
    assert [frame[0, 0, 0] for frame in found] == [1, 2, 9, 10, 100]
    assert "frame11.png" in caplog.text


@pytest.mark.usefixtures("ffmpeg")
@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 99, b"\x00\x00\x00\x20ftypisom"])
def test_rejects_a_video_that_does_not_open(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"video=.*broken.mp4 cannot be decoded \(.+\): use a"):
        open_frames(path)
    with pytest.raises(
        UsageError, match=r"video=/no/where.mp4 does not exist: use a video file or"
    ):
        open_frames(Path("/no/where.mp4"))


@pytest.mark.usefixtures("ffmpeg")
def test_video_that_is_truncated(
    goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.avi"
    rng = np.random.default_rng(0)
    write_video(path, rng.integers(0, 256, (30, *SHAPE), np.uint8), 25)
    whole = open_frames(path)
    assert len(list(whole)) == 30
    assert whole.problems == []
    os.truncate(path, path.stat().st_size // 2)
    found = open_frames(path)
    count = len(list(found))
    assert 3 < count < 27
    assert found.problems
    output = tmp_path / "a.gif"
    attention_video(str(goldens / "pth" / "backbone.pth"), path, output, size=(16,))
    metrics = json.loads(output.with_name(f"{output.name}.json").read_text())["metrics"]
    assert (metrics["frames"], metrics["fps"]) == (count, 25)
    assert metrics["damaged"] == len(found.problems)
    shown = capsys.readouterr()
    assert f"cut.avi is damaged: {metrics['damaged']} problems, the last one: " in shown.out


def test_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(UsageError, match=r"videos need ffmpeg: pip install -e '\.\[video\]'"):
        check_video_format(tmp_path / "x.mp4")
    with pytest.raises(UsageError, match=r"output=.*x.mov must end in one of .mp4, .avi, .gif"):
        check_video_format(tmp_path / "x.mov")
