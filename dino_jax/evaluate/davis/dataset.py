"""DAVIS 2017 on disk: frames, indexed masks and lists of sequences.

`ImageSets/2017/val.txt` names sequences; the frames of each are
`JPEGImages/480p/SEQUENCE/00000.jpg`, ..., and the masks `Annotations/480p/SEQUENCE/00000.png`, ...:
the first at least, all of them for a score (https://davischallenge.org).
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import UnreadableImage, decode, open_image
from dino_jax.data.sources.files import Files
from dino_jax.errors import UsageError
from dino_jax.evaluate.davis.score import VOID


@dataclasses.dataclass(frozen=True)
class Video:
    """A video with the true masks of its first frame."""

    name: str
    frames: Files
    frame_names: tuple[str, ...]  # without extension
    first: np.ndarray  # [H, W] uint8 labels, 0 for the background
    masks: dict[int, Path]  # of the frames to be scored, by number; empty for no score

    @property
    def num_objects(self) -> int:
        return int(self.first.max())


def open_davis(folder: Path, split: str = "val") -> list[Video]:
    """Opens a data set; of the pictures, only the first mask of each sequence is read.

    Args:
      folder: with ImageSets, JPEGImages and Annotations.
      split: name of the list in ImageSets/2017.
    Raises:
      UsageError: a list, a sequence or its first mask is missing or unusable, or some but not all
        of the masks after the first are there.
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
        raise UsageError(f"{path} names no sequence")
    return [_open_sequence(folder, name) for name in names]


def _open_sequence(folder: Path, name: str) -> Video:
    frames = sorted((folder / "JPEGImages" / "480p" / name).glob("[!.]*.jpg"))
    masks = folder / "Annotations" / "480p" / name
    if not frames:
        raise UsageError(f"sequence {name} has no frames *.jpg in {folder / 'JPEGImages/480p'}")
    stems = tuple(frame.stem for frame in frames)
    first_path = masks / f"{stems[0]}.png"
    if not first_path.is_file():
        raise UsageError(
            f"sequence {name} has no first mask {first_path}: without it there is nothing to follow"
        )
    try:
        height, width, _ = decode(open_image(frames[0])).shape
        first = read_mask(first_path, (height, width))
    except UnreadableImage as error:
        raise UsageError(f"the first frame or mask of sequence {name}: {error}") from error
    if not first.any():
        raise UsageError(f"{first_path} has no object: there is nothing to follow")
    # The official score leaves out the first and the last frame.
    scored = {i: masks / f"{stem}.png" for i, stem in enumerate(stems[1:-1], 1)}
    missing = [path for path in scored.values() if not path.is_file()]
    if 0 < len(missing) < len(scored):
        raise UsageError(
            f"sequence {name} lacks {len(missing)} of the {len(scored)} masks of the frames to be "
            f"scored, such as {missing[0].name}: give all, or the first alone for no score"
        )
    return Video(name, Files(f"sequence {name}", frames), stems, first, {} if missing else scored)


def read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Reads an indexed PNG.

    Args:
      path: of the file.
      shape: height and width that it must have.
    Returns: [H, W] uint8 labels; void counts as background.
    Raises:
      UnreadableImage: it is broken, of another size, or has colours instead of labels.
    """
    with open_image(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise UnreadableImage(f"{path} has colours instead of labels (mode {image.mode})")
        if (image.height, image.width) != shape:
            raise UnreadableImage(
                f"{path} has {image.width}x{image.height} pixels and its frame "
                f"{shape[1]}x{shape[0]}"
            )
        try:
            labels = np.array(image, np.uint8)
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"{path} is damaged: {error}") from error
    labels[labels == VOID] = 0
    return labels


def palette() -> np.ndarray:
    """The colours of the labels, [256, 3] uint8, as the masks of DAVIS have them.

    The first 22 follow PASCAL VOC: of a label's bits, from the lowest on, the first three say
    whether red, green and blue have 128, the next three whether they have 64; but both together
    are 191 in DAVIS. The others are grey.
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
