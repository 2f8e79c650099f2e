"""The attention-video job."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UsageError
from dino_jax.evaluate.features.picture_pass import PicturePass
from dino_jax.jobs.attention_video import attention_video
from dino_jax.visualize.pictures import fit_to_patches
from dino_jax.visualize.sheet import color_map
from dino_jax.visualize.video import open_frames, write_video
from tests.support import runs
from tests.support.clips import clip
from tests.support.moving_square import assert_alike, frames, read


@pytest.fixture
def ffmpeg() -> None:
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg (extra `video`) is not installed")


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
        assert_alike(frame[:, :56], fit_to_patches(original, (48,), 8))
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
        ({"threshold": 1.5}, "threshold=1.5 must be between 0 and 1"),
        ({"fps": 0.0}, "fps=0.0 must be above 0 and finite"),
        ({"fps": np.nan}, "fps=nan must be above 0"),
        ({"fps": np.inf}, "fps=inf must be above 0"),
        ({"fps": 60.0}, r"fps=60 is above 50, the maximum for a \.gif: write an .mp4"),
        ({"output": Path("a.txt")}, "output=a.txt must end in"),
        ({"size": (4,)}, "size=4: give height and width"),
    ],
)
def test_job_refuses(changes: dict, message: str, goldens: Path, tmp_path: Path) -> None:
    video = tmp_path / "frames"
    video.mkdir()
    Image.new("RGB", (8, 8)).save(video / "0.png")
    weights = str(goldens / "pth" / "backbone.pth") if "size" in changes else "/nowhere"
    arguments = {"weights": weights, "video": video}
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
    monkeypatch.setattr(PicturePass, "stream_frames", lambda *_: iter(maps))
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
        (folder / "in.gif", tmp_path / "link.gif", None, "link.gif is the input video"),
        (folder, tmp_path / "a.gif", folder, r"keep_frames=.*frames is inside the folder of input"),
        (folder, tmp_path / "a.gif", folder / "kept", r"keep_frames=.*kept is inside the folder"),
        (folder, folder / "a.gif", None, r"output=.*a\.gif is inside the folder of input frames"),
        (folder, tmp_path / "a.gif", tmp_path / "file", r"keep_frames: folder .*file cannot"),
    ):
        with pytest.raises(UsageError, match=message):
            attention_video("/nowhere", read_from, output, keep_frames=kept)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
