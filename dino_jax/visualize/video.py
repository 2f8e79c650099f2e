"""Frames in and out: video files through ffmpeg, folders of images, animated GIFs.

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
from dino_jax.data.sources.files import natural_order
from dino_jax.data.sources.opening import open_source
from dino_jax.errors import UsageError
from dino_jax.output import whole_or_nothing

FORMATS = (".mp4", ".avi", ".gif")  # that can be written
FPS = 25.0  # where nothing else is known
GIF_FPS = 50.0  # at most; frames of a GIF shorter than 2 hundredths are shown for 10


class Frames(Protocol):
    """Frames in order; each iteration starts from the first again.

    Attributes:
      fps: frames a second.
      problems: what was damaged in the last iteration: images, or what ffmpeg said of a file.
    """

    fps: float
    problems: list[str]

    def __iter__(self) -> Iterator[np.ndarray]:
        """[H, W, 3] uint8 each."""
        ...


class VideoFile:
    """A file that ffmpeg can decode; its first frame is, to see that it does.

    Raises:
      UsageError: it does not open, or ffmpeg is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A format whose first line says size and rate, for machines, unlike what ffmpeg prints.
        first = subprocess.run(
            [*_reader(path), "-frames:v", "1", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "-"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+)", first.stdout)
        if not header:
            said = first.stderr.decode(errors="replace").strip().splitlines()
            raise UsageError(
                f"video={path} does not open ({said[-1] if said else 'it has no frame'}): give a "
                "video that ffmpeg plays, or a folder of frames"
            )
        width, height, frames, seconds = map(int, header.groups())
        self.fps = frames / seconds if frames and seconds else FPS
        self.problems: list[str] = []
        self._shape = (height, width, 3)

    def __iter__(self) -> Iterator[np.ndarray]:
        command = [*_reader(self._path), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        size = math.prod(self._shape)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "bufsize": size}
        with tempfile.TemporaryFile() as said:  # a pipe that nobody reads might fill up
            with subprocess.Popen(command, stderr=said, **pipes) as process:
                while len(frame := process.stdout.read(size)) == size:
                    yield np.frombuffer(frame, np.uint8).reshape(self._shape)
            said.seek(0)
            self.problems = said.read().decode(errors="replace").splitlines()
        if process.returncode and not self.problems:
            self.problems = [f"ffmpeg ended with code {process.returncode}"]


class FolderOfFrames:
    """Image files in the order of the numbers in their names; unreadable ones are left out.

    Raises:
      UsageError: there is no image in the folder.
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
      UsageError: it is neither, or does not open.
    """
    if path.is_dir():
        return FolderOfFrames(path, max_unreadable)
    if not path.is_file():
        raise UsageError(f"video={path} does not exist: give a video file or a folder of frames")
    return VideoFile(path)


def check_video_format(path: Path) -> None:
    """Raises UsageError where a video of this name cannot be written."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"output={path} must end in one of {', '.join(FORMATS)}")
    if path.suffix.lower() != ".gif":
        _ffmpeg()


def check_fps(path: Path, fps: float) -> None:
    """Raises UsageError for frames a second that a video of this name cannot have."""
    if not 0 < fps < math.inf:
        raise UsageError(f"fps={fps} must be above 0 and finite")
    if path.suffix.lower() == ".gif" and fps > GIF_FPS:
        raise UsageError(
            f"fps={fps:g} is more than the {GIF_FPS:g} that players show of a .gif: write an .mp4, "
            f"or give --fps {GIF_FPS:g}, which plays slower"
        )


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Encodes frames: H.264 in mp4 or avi, or an animated GIF; a failure leaves an earlier file.

    Args:
      path: its ending is one of `FORMATS`.
      frames: [H, W, 3] uint8, at least one, all of one size; H.264 gets a black row or column
        more where a side is odd.
      fps: frames a second.
    Raises:
      UsageError: ffmpeg does not succeed.
    """
    frames = iter(frames)
    first = next(frames)
    if path.suffix.lower() == ".gif":
        first, *others = (Image.fromarray(x).quantize() for x in itertools.chain([first], frames))
        # Milliseconds; the format knows hundredths of a second, so it is the ends that are rounded.
        ends = np.round(np.arange(len(others) + 2) * 100 / fps).astype(int)
        durations = (10 * np.diff(ends)).tolist()
        with whole_or_nothing(path) as part:
            first.save(part, save_all=True, append_images=others, duration=durations, loop=0)
        return
    height, width = first.shape[:2]
    command = [_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-c:v", "libx264"]
    # What every player takes: colours at half the resolution, and so even sides.
    command += ["-pix_fmt", "yuv420p", "-vf", "pad=2*ceil(iw/2):2*ceil(ih/2)", "-crf", "16"]
    with whole_or_nothing(path) as part:
        process = subprocess.Popen([*command, f"file:{part}"], stdin=subprocess.PIPE)
        # Left by an error of ffmpeg's own, which it has printed.
        with contextlib.suppress(BrokenPipeError), process:
            for frame in itertools.chain([first], frames):
                process.stdin.write(frame.tobytes())
        if process.returncode:
            raise UsageError(f"output={path} cannot be encoded; ffmpeg says why above")


def _reader(path: Path) -> list[str]:
    """The beginning of a command that decodes a file's first video stream."""
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
