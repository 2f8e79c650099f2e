"""The attention-video job: the attention of the class token, frame by frame."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm
from tyro.conf import arg

from dino_jax.data.decode import decode
from dino_jax.errors import UsageError
from dino_jax.evaluate.features.backbone import PassOptions, PlacedBackbone
from dino_jax.evaluate.features.picture_features import (
    AttentionMaps,
    batch_that_fits,
    check_attention,
)
from dino_jax.evaluate.features.picture_pass import PicturePass
from dino_jax.jobs.drawing import OPTIONS
from dino_jax.jobs.results import report
from dino_jax.output import check_folder, check_writable, remove_earlier
from dino_jax.paths import local_paths
from dino_jax.visualize.attention_masks import check_threshold, mass_mask, to_pixels
from dino_jax.visualize.pictures import check_input_size, fit_to_patches, resized_shape
from dino_jax.visualize.sheet import as_rgb, color_map, draw_masks
from dino_jax.visualize.video import (
    Frames,
    check_fps,
    check_video_format,
    open_frames,
    write_video,
)

COLOR = (255, 150, 40)  # of the mask


@local_paths
def attention_video(
    weights: str,
    video: Path,
    output: Path,
    size: tuple[int, ...] = (480,),
    threshold: float | None = None,
    beside: bool = False,
    fps: float | None = None,
    keep_frames: Path | None = None,
    options: Annotated[PassOptions, arg(name="")] = OPTIONS,
) -> Path:
    """Draws the attention of the class token, averaged over the heads, for every frame of a video.

    All frames share one colour scale, so the video does not flicker.

    Args:
      weights: A hub name, a .pth file, a converted folder, a run folder, or WORKDIR@STEP.
      video: A video file, or a folder of frames.
      output: The video to write: .mp4, .avi (both H.264) or .gif. Settings, the weights' hash and
        the damage found in the input are written beside it, for example to NAME.mp4.json.
      size: Pixels of the shorter side, which keeps the aspect ratio; or height and width; 0 to keep
        the size of the frames.
      threshold: Draw the mask that holds this share of the mass over the frame, not the map.
      beside: Show the frame on the left.
      fps: Frames per second of the output, at most 50 for a .gif; default: as the input, and 25 for
        a folder.
      keep_frames: A folder for the frames of the output as PNG files.
      options: How the backbone processes the frames.

    Returns: the output video.
    Raises:
      UsageError: something cannot be loaded, opened or written, or the network has no attention.
    """
    settings = {"weights": weights, "video": video, "size": size, "threshold": threshold}
    settings |= {"beside": beside, "fps": fps, "keep_frames": keep_frames}
    settings |= dataclasses.asdict(options)
    check_threshold(threshold)
    check_video_format(output)
    about = output.with_name(f"{output.name}.json")
    for file in (output, about):
        check_writable(file)
    frames = open_frames(video, options.max_unreadable)
    _check_apart(video, output, keep_frames)
    fps = frames.fps if fps is None else fps
    check_fps(output, fps)
    if keep_frames:
        check_folder(keep_frames, "keep_frames")
    backbone = PlacedBackbone(weights, options)
    check_attention(backbone.model, backbone.info.source)
    patch_size, channels = backbone.info.patch_size, len(backbone.info.mean)
    check_input_size(size, patch_size)
    maps = _maps(backbone, _fitted(frames, size, patch_size, channels))
    if not maps:
        raise UsageError(f"video={video} has no readable frame")
    if jax.process_index() > 0:
        return output
    limits = float(np.min(maps)), float(np.quantile(maps, 0.999))

    def drawn() -> Iterator[np.ndarray]:
        fitted = _fitted(frames, size, patch_size, channels)
        for number, (frame, values) in enumerate(zip(fitted, maps, strict=True)):
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
    notes, problems = [f"frames in {output}: {len(maps)}"], frames.problems
    if problems:
        notes.append(f"{video} is damaged: {len(problems)} problems, the last one: {problems[-1]}")
    metrics = {"frames": len(maps), "fps": fps, "damaged": len(problems), "damage": problems[-1:]}
    report(about, "attention-video", metrics, settings, backbone.info, notes=notes)
    return output


def _fitted(
    frames: Frames, size: tuple[int, ...], patch_size: int, channels: int
) -> Iterator[np.ndarray]:
    """The frames as the network sees them; all get the size of the first one."""
    shape = None
    for frame in frames:
        shape = shape or resized_shape(frame.shape[:2], size, patch_size)
        yield fit_to_patches(decode(Image.fromarray(frame), channels=channels), shape, patch_size)


def _maps(backbone: PlacedBackbone, frames: Iterator[np.ndarray]) -> list[np.ndarray]:
    """The mean map over the heads of every frame."""
    first = next(frames, None)
    if first is None:
        return []
    batch_size = backbone.options.batch_size
    batch_size = batch_that_fits(first.shape[:2], backbone.model, backbone.mesh, batch_size)
    feature = AttentionMaps(backbone.info.mean, backbone.info.std)
    frames = itertools.chain([first], frames)
    rows = PicturePass(backbone).stream_frames(feature, frames, batch_size)
    bar = tqdm(rows, "attention", unit=" frames", disable=jax.process_index() > 0)
    return [row.mean(axis=0) for row in bar]


def _check_apart(video: Path, output: Path, keep_frames: Path | None) -> None:
    """Raises UsageError if the output would overwrite the input, or become a frame of it."""
    if output.exists() and output.samefile(video):
        raise UsageError(f"output={output} is the input video: choose another name")
    folder = video.resolve()
    for argument, path in (("output", output), ("keep_frames", keep_frames)):
        if path and folder in (path.resolve(), *path.resolve().parents):
            raise UsageError(
                f"{argument}={path} is inside the folder of input frames, {video}: choose another "
                "folder"
            )
