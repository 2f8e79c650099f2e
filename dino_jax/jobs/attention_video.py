"""The attention-video job: where the class token looks, frame by frame."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from dino_jax.data.decode import decode
from dino_jax.errors import UsageError
from dino_jax.jobs.results import write_results
from dino_jax.output import check_folder, check_writable, remove_earlier
from dino_jax.visualize.attention import attention_of, check_threshold, mass_mask, to_pixels
from dino_jax.visualize.pictures import check_size, fit, resized_shape
from dino_jax.visualize.sheet import as_rgb, color_map, draw_masks
from dino_jax.visualize.video import check_format, check_fps, open_frames, write_video
from dino_jax.weights.load import load

COLOR = (255, 150, 40)  # of the mask


def attention_video(
    weights: str,
    video: Path,
    output: Path,
    which: Literal["teacher", "student"] = "teacher",
    size: tuple[int, ...] = (480,),
    threshold: float | None = None,
    beside: bool = False,
    fps: float | None = None,
    keep_frames: Path | None = None,
) -> Path:
    """Draws the attention of the class token, averaged over the heads, to every frame of a video.

    The colours mean the same in all frames, so that nothing flickers.

    Args:
      weights: A hub name, a .pth file, a converted folder, or a run folder (its workdir).
      video: A video file, or a folder of frames.
      output: The video to write: .mp4, .avi (both H.264) or .gif. Settings, weights' hash and what
        was damaged are beside it, in NAME.mp4.json or the like.
      which: The network of a run; the teacher is the better one.
      size: Pixels of the shorter side, which keeps the shape; or height and width; 0 for frames as
        they are.
      threshold: Share of the mass: draws its mask over the frame instead of the map.
      beside: Show the frame to the left.
      fps: Frames a second of the output, at most 50 of a .gif; unset, as the input, and 25 for a
        folder.
      keep_frames: A folder for the frames of the output as PNG files.

    Returns: the video written.
    Raises:
      UsageError: something cannot be loaded, opened or written; the network has no attention.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    check_threshold(threshold)
    check_format(output)
    about = output.with_name(f"{output.name}.json")
    for file in (output, about):
        check_writable(file)
    frames = open_frames(video)
    _check_apart(video, output, keep_frames)
    fps = frames.fps if fps is None else fps
    check_fps(output, fps)
    if keep_frames:
        check_folder(keep_frames, "keep_frames")
    model, info = load(weights, which=which)
    attend = attention_of(model, info)
    patch_size = info.patch_size
    check_size(size, patch_size)

    def fitted() -> Iterator[np.ndarray]:
        shape = None
        for frame in frames:  # the first one's size is everyone's
            shape = shape or resized_shape(frame.shape[:2], size, patch_size)
            pixels = decode(Image.fromarray(frame), channels=len(info.mean))
            yield fit(pixels, shape, patch_size)

    maps = [attend(frame).mean(axis=0) for frame in tqdm(fitted(), "attention", unit=" frames")]
    if not maps:
        raise UsageError(f"video={video} holds no frame that can be read")
    limits = float(np.min(maps)), float(np.quantile(maps, 0.999))

    def drawn() -> Iterator[np.ndarray]:
        for number, (frame, values) in enumerate(zip(fitted(), maps, strict=True)):
            shape = frame.shape[:2]
            if threshold is None:
                picture = color_map(to_pixels(values, patch_size, shape), limits)
            else:
                mask = to_pixels(mass_mask(values, threshold), patch_size, shape)
                picture = draw_masks(frame, mask[None], [COLOR])
            if beside:
                picture = np.concatenate([as_rgb(frame), picture], axis=1)
            if keep_frames:
                Image.fromarray(picture).save(keep_frames / f"frame_{number:05d}.png")
            yield picture

    if keep_frames:
        remove_earlier(keep_frames, r"frame_\d{5,}\.png")
    write_video(output, drawn(), fps)
    print(f"frames in {output}: {len(maps)}")
    problems = frames.problems
    if problems:
        print(f"{video} is damaged; the last of {len(problems)} complaints: {problems[-1]}")
    metrics = {"frames": len(maps), "fps": fps, "damaged": len(problems), "damage": problems[-1:]}
    write_results(about, "attention-video", metrics, settings, info)
    return output


def _check_apart(video: Path, output: Path, keep_frames: Path | None) -> None:
    """Raises UsageError where what is written would fall on what is read."""
    if output.exists() and output.samefile(video):
        raise UsageError(f"output={output} is the video that is read: give another name")
    folder = video.resolve()
    if keep_frames and folder in (keep_frames.resolve(), *keep_frames.resolve().parents):
        raise UsageError(
            f"keep_frames={keep_frames} lies in the folder of frames that is read, {video}: give "
            "another folder"
        )
