"""Videos in and out, through the packaged ffmpeg."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UsageError
from dino_jax.jobs import attention_video as video_job
from dino_jax.jobs.attention_video import attention_video
from dino_jax.visualize import video
from dino_jax.visualize.pictures import fit
from dino_jax.visualize.sheet import color_map
from dino_jax.visualize.video import FPS, check_format, open_frames, write_video
from tests.support import runs
from tests.support.clips import clip

SHAPE = (48, 64, 3)


@pytest.fixture
def ffmpeg() -> None:
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (extra `video`) is not installed")


def frames(count: int = 6) -> Iterator[np.ndarray]:
    """A square that wanders to the right."""
    for i in range(count):
        frame = np.full(SHAPE, (30, 60, 90), np.uint8)
        frame[16:32, 8 * i : 8 * i + 16] = (220, 200, 40)
        yield frame


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def assert_alike(ours: np.ndarray, expected: np.ndarray) -> None:
    """But for what coding and halved colours lose at the square's edges."""
    assert np.abs(ours.astype(int) - expected).mean() < 6


@pytest.mark.usefixtures("ffmpeg")
@pytest.mark.parametrize("name", ["wander.mp4", "wander.avi", "12:30.mp4", "-a.mp4"])
def test_h264_is_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    write_video(path, frames(), 12.5)
    found = open_frames(path)
    assert found.fps == 12.5
    for _ in range(2):  # every iteration starts anew
        for ours, expected in zip(found, frames(), strict=True):
            assert ours.shape == SHAPE
            assert_alike(ours, expected)
    content = path.read_bytes()
    assert b"avc1" in content or b"H264" in content


@pytest.mark.usefixtures("ffmpeg")
@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_a_failure_leaves_the_earlier_video(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"wander{ending}"
    path.write_text("earlier")
    with pytest.raises(ZeroDivisionError):
        write_video(path, (frame // (i < 4 or 1 // 0) for i, frame in enumerate(frames())), 5)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "earlier"}


@pytest.mark.usefixtures("ffmpeg")
def test_odd_sides_get_one_pixel_more(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    write_video(path, (frame[:47, :63] for frame in frames()), 5)
    first = next(iter(open_frames(path)))
    assert first.shape == SHAPE
    assert_alike(first[:47, :63], next(frames())[:47, :63])


def test_gif_needs_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_ffmpeg", lambda: 1 / 0)
    path = tmp_path / "wander.gif"
    check_format(path)
    write_video(path, frames(), 10)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (6, 100, 0)
        gif.seek(4)
        assert_alike(np.asarray(gif.convert("RGB")), list(frames())[4])


@pytest.mark.parametrize("fps", [7, 12.5, 24, 30, 30000 / 1001, 50])
def test_gif_plays_at_its_speed(fps: float, tmp_path: Path) -> None:
    """Its durations are hundredths of a second, and their rounding does not add up."""
    path, shown = tmp_path / "noise.gif", 0
    write_video(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), fps)
    with Image.open(path) as gif:
        assert gif.n_frames == 40
        for i in range(gif.n_frames):
            gif.seek(i)
            assert gif.info["duration"] >= 20
            shown += gif.info["duration"]
            assert shown == pytest.approx(1000 * (i + 1) / fps, abs=5)


def test_folder_of_frames_by_the_numbers_in_their_names(
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
def test_a_video_that_does_not_open(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"video=.*broken.mp4 does not open \(.+\): give a video"):
        open_frames(path)
    with pytest.raises(
        UsageError, match=r"video=/no/where.mp4 does not exist: give a video file or"
    ):
        open_frames(Path("/no/where.mp4"))


@pytest.mark.usefixtures("ffmpeg")
def test_a_video_that_breaks_off(
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
    assert f"cut.avi is damaged; the last of {metrics['damaged']} complaints: " in shown.out


def test_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(UsageError, match=r"videos need ffmpeg: pip install -e '\.\[video\]'"):
        check_format(tmp_path / "x.mp4")
    with pytest.raises(UsageError, match=r"output=.*x.mov must end in one of .mp4, .avi, .gif"):
        check_format(tmp_path / "x.mov")


@pytest.mark.usefixtures("ffmpeg")
def test_job_from_a_video_to_a_video(goldens: Path, tmp_path: Path) -> None:
    source, output, kept = tmp_path / "in.mp4", tmp_path / "out" / "a.mp4", tmp_path / "kept"
    write_video(source, frames(), 10)
    weights = str(goldens / "pth" / "backbone.pth")
    attention_video(weights, source, output, size=(32,), beside=True, keep_frames=kept)
    found = open_frames(output)
    assert found.fps == 10
    assert [frame.shape for frame in found] == [(32, 80, 3)] * 6  # 32x43 cut to patches of 8
    pictures = sorted(kept.iterdir())
    assert [path.name for path in pictures] == [f"frame_{i:05d}.png" for i in range(6)]
    for path, frame in zip(pictures, found, strict=True):
        assert_alike(frame, read(path))
    result = json.loads(output.with_name(f"{output.name}.json").read_text())
    assert result["metrics"] == {"frames": 6, "fps": 10.0, "damaged": 0, "damage": []}
    assert result["settings"]["beside"] is True
    assert len(result["weights"]["sha256"]) == 64


def test_job_on_a_real_video(goldens: Path, tmp_path: Path) -> None:
    output, source = tmp_path / "a.mp4", clip("carphone_pristine")
    weights = str(goldens / "pth" / "backbone.pth")
    attention_video(weights, source, output, size=(48,), beside=True)
    metrics = json.loads(output.with_name(f"{output.name}.json").read_text())["metrics"]
    assert metrics == {"frames": 120, "fps": 30000 / 1001, "damaged": 0, "damage": []}
    found = open_frames(output)
    assert found.fps == metrics["fps"]
    for frame, original in zip(found, open_frames(source), strict=True):
        assert frame.shape == (48, 2 * 56, 3)  # of 48x59 pixels, cut to patches of 8
        assert_alike(frame[:, :56], fit(original, (48,), 8))
    assert np.ptp(frame[:, 56:], axis=(0, 1)).min() > 50  # the map has many colours


def test_job_from_a_folder_with_a_threshold(goldens: Path, tmp_path: Path) -> None:
    """Frames of other sizes get the first one's."""
    folder = tmp_path / "frames"
    folder.mkdir()
    (tmp_path / "k").mkdir()
    for name in ("frame_00003.png", "frame_12345.png", "frame_7.png", "mine.png"):
        (tmp_path / "k" / name).touch()  # of a longer video, and of others
    for i, frame in enumerate(frames(3)):
        Image.fromarray(frame[: 48 - 8 * i]).save(folder / f"{i}.png")
    (folder / "1_broken.png").write_text("no picture")
    weights, output, kept = (
        str(goldens / "pth" / "backbone.pth"),
        tmp_path / "a.gif",
        tmp_path / "k",
    )
    attention_video(weights, folder, output, size=(0,), threshold=0.5, keep_frames=kept, fps=20)
    with Image.open(output) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (64, 48), 50)
    metrics = json.loads(output.with_name(f"{output.name}.json").read_text())["metrics"]
    assert metrics["damage"] == [str(folder / "1_broken.png")]
    assert (metrics["frames"], metrics["damaged"]) == (3, 1)
    drawn = [f"frame_{i:05d}.png" for i in range(3)]
    assert sorted(path.name for path in kept.iterdir()) == [*drawn, "frame_7.png", "mine.png"]
    first = read(kept / "frame_00000.png").astype(int)
    dimmed = np.abs(first - np.round(0.6 * next(frames()))).max(axis=-1) <= 1
    assert 0.2 < dimmed.mean() < 0.95  # the rest holds half of the mass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5 must lie between 0 and 1"),
        ({"fps": 0.0}, "fps=0.0 must be above 0 and finite"),
        ({"fps": np.nan}, "fps=nan must be above 0"),
        ({"fps": np.inf}, "fps=inf must be above 0"),
        ({"fps": 60.0}, r"fps=60 is more than the 50 that players show of a \.gif: write an .mp4"),
        ({"output": Path("a.txt")}, "output=a.txt must end in"),
        ({"size": (4,)}, "size=4: give height and width"),
    ],
)
def test_job_refuses(changes: dict, message: str, goldens: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    weights = str(goldens / "pth" / "backbone.pth") if "size" in changes else "/nowhere"
    arguments = {"weights": weights, "video": tmp_path}
    with pytest.raises(UsageError, match=message):
        attention_video(**arguments | {"output": tmp_path / "a.gif"} | changes)


def test_map_is_the_heads_mean_and_its_colours_are_those_of_all_frames(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = tmp_path / "frames", tmp_path / "kept"
    folder.mkdir()
    for i, frame in enumerate(frames(3)):
        Image.fromarray(frame).save(folder / f"{i}.png")
    maps = np.random.default_rng(0).random((3, 4, 6, 8)) * np.array([1, 3, 2])[:, None, None, None]
    given = iter(maps)
    monkeypatch.setattr(video_job, "attention_of", lambda *_: lambda _: next(given))
    weights, output = str(goldens / "pth" / "backbone.pth"), tmp_path / "a.gif"
    attention_video(weights, folder, output, size=(0,), keep_frames=kept)
    means = maps.mean(axis=1)
    limits = means.min(), np.quantile(means, 0.999)
    for path, values in zip(sorted(kept.iterdir()), means, strict=True):
        expected = color_map(np.kron(values, np.ones((8, 8))), limits)
        np.testing.assert_array_equal(read(path), expected)


def test_job_with_a_network_of_one_channel(tmp_path: Path) -> None:
    """Which sees the frames in grey, as they are shown beside."""
    workdir, folder, kept = tmp_path / "run", tmp_path / "frames", tmp_path / "kept"
    config = runs.tiny_config(crops__mean=(0.5,), crops__std=(0.25,))
    runs.train_here(config, workdir, stop_after=1)
    folder.mkdir()
    for i, frame in enumerate(frames(2)):
        Image.fromarray(frame).save(folder / f"{i}.png")
    attention_video(
        str(workdir), folder, tmp_path / "a.gif", size=(0,), beside=True, keep_frames=kept
    )
    shown = read(kept / "frame_00001.png")
    assert shown.shape == (48, 128, 3)
    grey = np.asarray(Image.fromarray(list(frames(2))[1]).convert("L"))
    np.testing.assert_array_equal(shown[:, :64], np.stack([grey] * 3, axis=-1))


@pytest.mark.usefixtures("ffmpeg")
def test_job_never_writes_over_its_input(tmp_path: Path) -> None:
    """Nor does it load weights first."""
    video, folder = tmp_path / "in.gif", tmp_path / "frames"
    write_video(video, frames(2), 10)
    folder.mkdir()
    video.rename(folder / "in.gif")
    Image.new("RGB", (8, 8)).save(folder / "frame_00000.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link.gif").hardlink_to(folder / "in.gif")
    (tmp_path / "file").touch()
    for read_from, output, kept, message in (
        (folder / "in.gif", tmp_path / "link.gif", None, "link.gif is the video that is read"),
        (folder, tmp_path / "a.gif", folder, r"keep_frames=.*frames lies in the folder of frames"),
        (folder, tmp_path / "a.gif", folder / "kept", r"keep_frames=.*kept lies in the folder"),
        (folder, tmp_path / "a.gif", tmp_path / "file", r"keep_frames: the folder .*file cannot"),
    ):
        with pytest.raises(UsageError, match=message):
            attention_video("/nowhere", read_from, output, keep_frames=kept)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
