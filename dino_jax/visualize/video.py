"""Reads and writes videos: files through ffmpeg, folders of images, animated GIFs.

Dims: `H, W` pixels of a frame.
"""

import contextlib
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dino_jax.data.decode import decode
from dino_jax.data.pipeline import Records
from dino_jax.data.sources import open_source
from dino_jax.data.sources.files import natural_order
from dino_jax.errors import UsageError
from dino_jax.output import whole_or_nothing

FORMATS = (".mp4", ".avi", ".gif")  # that can be written
FPS = 25.0  # default
GIF_FPS = 50.0  # maximum; players slow down GIFs with frames below 2 hundredths of a second


class Frames(Protocol):
    """Frames in order; each iteration starts at the first frame.

    Attributes:
      fps: frames per second.
      problems: of the last iteration: unreadable images, or the errors that ffmpeg printed.
    """

    fps: float
    problems: list[str]

    def __iter__(self) -> Iterator[np.ndarray]:
        """[H, W, 3] uint8 each."""
        ...


class VideoFile:
    """A file that ffmpeg can decode; decodes the first frame to check that.

    Raises:
      UsageError: it cannot be decoded, or ffmpeg is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # The first line of this format has size and frame rate in a stable notation.
        first = subprocess.run(
            [*_reader(path), "-frames:v", "1", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "-"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+)", first.stdout)
        if not header:
            said = first.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else "it has no frame"
            raise UsageError(
                f"video={path} cannot be decoded ({reason}): use a video that ffmpeg supports, or "
                "a folder of frames"
            )
        width, height, frames, seconds = map(int, header.groups())
        self.fps = frames / seconds if frames and seconds else FPS
        self.problems: list[str] = []
        self._shape = (height, width, 3)

    def __iter__(self) -> Iterator[np.ndarray]:
        command = [*_reader(self._path), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        size = math.prod(self._shape)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "bufsize": size}
        with tempfile.TemporaryFile() as said:  # a pipe without a reader could fill up
            with subprocess.Popen(command, stderr=said, **pipes) as process:
                while len(frame := process.stdout.read(size)) == size:
                    yield np.frombuffer(frame, np.uint8).reshape(self._shape)
            said.seek(0)
            self.problems = said.read().decode(errors="replace").splitlines()
        if process.returncode and not self.problems:
            self.problems = [f"ffmpeg ended with code {process.returncode}"]


class FolderOfFrames:
    """Image files, ordered by the numbers in their names; unreadable ones are skipped.

    Raises:
      UsageError: there are no images in the folder.
    """

    fps = FPS

    def __init__(self, path: Path, max_unreadable: float) -> None:
        source = open_source(f"folder:{path}")
        self._records = Records(source, max_unreadable=max_unreadable)
        self._order = sorted(range(len(source)), key=lambda i: natural_order(source.name(i)))

    @property
    def problems(self) -> list[str]:
        unreadable = self._records.unreadable
        return [self._records.source.name(i) for i in self._order if i in unreadable]

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in self._order:
            if (pixels := self._records.read(index, decode)) is not None:
                yield pixels


def open_frames(path: Path, max_unreadable: float = 1.0) -> Frames:
    """Opens a video file or a folder of frames.

    Args:
      path: of the file or folder.
      max_unreadable: share of a folder's images that may be unreadable.
    Raises:
      UsageError: it is neither, or cannot be opened.
    """
    if path.is_dir():
        return FolderOfFrames(path, max_unreadable)
    if not path.is_file():
        raise UsageError(f"video={path} does not exist: use a video file or a folder of frames")
    return VideoFile(path)


def check_video_format(path: Path) -> None:
    """Raises UsageError if no video with this file name can be written."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"output={path} must end in one of {', '.join(FORMATS)}")
    if path.suffix.lower() != ".gif":
        _ffmpeg()


def check_fps(path: Path, fps: float) -> None:
    """Raises UsageError for a frame rate that a video with this file name cannot have."""
    if not 0 < fps < math.inf:
        raise UsageError(f"fps={fps} must be above 0 and finite")
    if path.suffix.lower() == ".gif" and fps > GIF_FPS:
        raise UsageError(
            f"fps={fps:g} is above {GIF_FPS:g}, the maximum for a .gif: write an .mp4, or use "
            f"--fps {GIF_FPS:g}, which plays slower"
        )


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Encodes frames as H.264 in mp4 or avi, or as an animated GIF; replaces the file atomically.

    Args:
      path: with an extension of `FORMATS`.
      frames: [H, W, 3] uint8, at least one, all of one size; for H.264, odd sides get an extra
        black row or column.
      fps: frames per second.
    Raises:
      UsageError: ffmpeg fails.
    """
    frames = iter(frames)
    first = next(frames)
    if path.suffix.lower() == ".gif":
        first, *others = (Image.fromarray(x).quantize() for x in itertools.chain([first], frames))
        # In milliseconds; GIFs count hundredths of a second, so the end times are rounded.
        ends = np.round(np.arange(len(others) + 2) * 100 / fps).astype(int)
        durations = (10 * np.diff(ends)).tolist()
        with whole_or_nothing(path) as part:
            first.save(part, save_all=True, append_images=others, duration=durations, loop=0)
        return
    height, width = first.shape[:2]
    command = [_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-c:v", "libx264"]
    # Supported by every player: colours at half the resolution, which needs even sides.
    command += ["-pix_fmt", "yuv420p", "-vf", "pad=2*ceil(iw/2):2*ceil(ih/2)", "-crf", "16"]
    with whole_or_nothing(path) as part:
        process = subprocess.Popen([*command, f"file:{part}"], stdin=subprocess.PIPE)
        # A broken pipe means that ffmpeg failed and has printed why.
        with contextlib.suppress(BrokenPipeError), process:
            for frame in itertools.chain([first], frames):
                process.stdin.write(frame.tobytes())
        if process.returncode:
            raise UsageError(f"output={path} cannot be encoded: see the message of ffmpeg above")


def _reader(path: Path) -> list[str]:
    """The start of a command that decodes the first video stream of a file."""
    return [_ffmpeg(), "-v", "error", "-i", f"file:{path}", "-map", "0:v:0"]


def _ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as error:
        raise UsageError(
            "videos need ffmpeg: pip install -e '.[video]', or read a folder of frames and "
            "write a .gif"
        ) from error
    return get_ffmpeg_exe()
