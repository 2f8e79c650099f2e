"""DAVIS 2017 on disk: frames, indexed masks and lists of sequences.

`ImageSets/2017/val.txt` names sequences; the frames of each are
`JPEGImages/480p/SEQUENCE/00000.jpg`, ..., and the masks `Annotations/480p/SEQUENCE/00000.png`, ...:
the first one is required, all of them are needed for a score (https://davischallenge.org).
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode, open_image
from dino_jax.data.sources.files import Files
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.score import VOID


@dataclasses.dataclass(frozen=True)
class Video:
    """A video with the true mask of its first frame."""

    name: str
    frames: Files
    frame_names: tuple[str, ...]  # without extension
    first: np.ndarray  # [H, W] uint8 labels, 0 for the background
    masks: dict[int, Path]  # true masks of the scored frames, by number; may be empty
    is_binary: bool = False  # whether the masks mark a single object with 255

    @property
    def num_objects(self) -> int:
        return int(self.first.max())


def open_davis(folder: Path, split: str = "val") -> list[Video]:
    """Opens a data set; reads only the first frame and mask of each sequence.

    Args:
      folder: contains ImageSets, JPEGImages and Annotations.
      split: name of the list in ImageSets/2017.
    Raises:
      UsageError: a list, a sequence or its first mask is missing or unusable, or only some of the
        masks after the first exist.
    """
    path = folder / "ImageSets" / "2017" / f"{split}.txt"
    try:
        names = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: data must be the folder of DAVIS 2017, with ImageSets, "
            "JPEGImages and Annotations, and split the name of a list"
        ) from error
    if not names:
        raise UsageError(f"{path} contains no sequence")
    return [_open_sequence(folder, name) for name in names]


def _open_sequence(folder: Path, name: str) -> Video:
    frames = sorted((folder / "JPEGImages" / "480p" / name).glob("[!.]*.jpg"))
    masks = folder / "Annotations" / "480p" / name
    if not frames:
        raise UsageError(f"sequence {name} has no frames *.jpg in {folder / 'JPEGImages/480p'}")
    stems = tuple(frame.stem for frame in frames)
    first_path = masks / f"{stems[0]}.png"
    if not first_path.is_file():
        raise UsageError(f"sequence {name} lacks its first mask {first_path}, which is required")
    try:
        height, width, _ = decode(open_image(frames[0])).shape
        first = read_mask(first_path, (height, width))
        if is_binary := not first.any():
            first = read_mask(first_path, (height, width), is_binary=True)
    except UnreadableImage as error:
        raise UsageError(f"the first frame or mask of sequence {name}: {error}") from error
    if not first.any():
        raise UsageError(f"{first_path} contains no object: at least one is required")
    if is_binary:
        logging.warning(
            "%s has no label but %d, which is void in DAVIS: it is taken as the only object of "
            "sequence %s",
            first_path,
            VOID,
            name,
        )
    # The official score excludes the first and the last frame.
    scored = {i: masks / f"{stem}.png" for i, stem in enumerate(stems[1:-1], 1)}
    missing = [path for path in scored.values() if not path.is_file()]
    if 0 < len(missing) < len(scored):
        raise UsageError(
            f"sequence {name} lacks {len(missing)} of the {len(scored)} masks of the scored "
            f"frames, such as {missing[0].name}: add them, or keep only the first mask for no score"
        )
    return Video(
        name, Files(f"sequence {name}", frames), stems, first, {} if missing else scored, is_binary
    )


def read_mask(path: Path, shape: tuple[int, int], *, is_binary: bool = False) -> np.ndarray:
    """Reads an indexed PNG.

    Args:
      path: of the file.
      shape: required height and width.
      is_binary: 255 marks a single object, instead of void.
    Returns: [H, W] uint8 labels; void counts as background.
    Raises:
      UnreadableImage: it is damaged, has another size, or contains colours instead of labels.
    """
    with open_image(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise UnreadableImage(f"{path} contains colours instead of labels (mode {image.mode})")
        if (image.height, image.width) != shape:
            raise UnreadableImage(
                f"{path} has {image.width}x{image.height} pixels, but its frame has "
                f"{shape[1]}x{shape[0]}"
            )
        try:
            labels = np.array(image, np.uint8)
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"{path} is damaged: {error}") from error
    labels[labels == VOID] = int(is_binary)
    return labels


def palette() -> np.ndarray:
    """The colours of the labels in the masks of DAVIS, [256, 3] uint8.

    The first 22 follow PASCAL VOC: the three lowest bits of a label add 128 to red, green and blue,
    the next three add 64; in DAVIS, both together give 191. The others are grey.
    """
    labels = np.arange(256)
    bits = labels[:, None] >> np.arange(6) & 1  # [256, 6]
    colors = np.minimum(128 * bits[:, :3] + 64 * bits[:, 3:], 191)
    return np.where(labels[:, None] < 22, colors, labels[:, None]).astype(np.uint8)


def write_mask(path: Path, labels: np.ndarray) -> None:
    """Writes labels [H, W] uint8 as an indexed PNG."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    image.save(path)


def labels_of_patches(labels: np.ndarray, grid: tuple[int, int], num_classes: int) -> np.ndarray:
    """The class of every patch, one-hot: [H, W] uint8 -> [h, w, num_classes] float32."""
    small = Image.fromarray(labels).resize(grid[::-1], Image.Resampling.NEAREST)
    return np.eye(num_classes, dtype=np.float32)[np.asarray(small)]
