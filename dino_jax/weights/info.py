"""Facts about a loaded model, and the preprocessing of its input images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dino_jax.data.decode import UnreadableImage, resize_and_crop
from dino_jax.errors import UsageError

Picture = Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Facts about a loaded model: architecture, origin and preprocessing."""

    arch: str  # a key of `models.MODELS`
    patch_size: int | None  # pixels; None for a ResNet
    embed_dim: int  # width of the features
    num_heads: int | None  # of each attention block; None for a ResNet
    num_registers: int  # tokens between the class token and the patch tokens
    source: str  # as passed to `load`, with the step
    sha256: str  # a hash of weights and sizes, independent of the compute dtype
    which: str  # teacher, student or untrained
    dtype: str  # compute dtype
    resize: int  # pixels of the shorter side
    crop: int  # pixels per side of the center crop
    canvas_size: int  # evaluation jobs first shrink larger images to this size
    mean: tuple[float, ...]  # per channel in 0..1, subtracted from the input
    std: tuple[float, ...]  # per channel, divides the input

    def preprocess(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """Converts images to the model's input (paper, appendix F.1).

        Each image is resized to `resize` pixels on its shorter side (bicubic, antialiased), cropped
        to its center of `crop` pixels and normalized with `mean` and `std`.

        Args:
          images: one or more images of any size: PIL images, or arrays [H, W], [H, W, C] or
            [B, H, W, C], uint8 in 0..255 or floating point in 0..1 (rounded to 8 bits).
        Returns: [B, crop, crop, C] float32; B is 1 for a single image.
        Raises:
          UsageError: there is no image, or an array has an unsupported shape, dtype or range.

        Example:
          model, info = dino_jax.load("dino_vits16")
          features = model(info.preprocess(PIL.Image.open("cat.jpg")))  # [1, 384]
        """
        if isinstance(images, str | bytes | Path):
            raise UsageError(
                f"{images!r} is a path: open it first, for example with PIL.Image.open"
            )
        if isinstance(images, Image.Image) or (hasattr(images, "ndim") and images.ndim < 4):
            images = [images]
        pixels = [self._square(image) for image in images]
        if not pixels:
            raise UsageError("no image to preprocess: pass at least one")
        scaled = np.stack(pixels).astype(np.float32) / 255
        return (scaled - np.float32(self.mean)) / np.float32(self.std)

    def _square(self, image: Picture) -> np.ndarray:
        # A copy, since decoding closes the image.
        picture = image.copy() if isinstance(image, Image.Image) else _picture(np.asarray(image))
        try:
            return resize_and_crop(picture, self.resize, self.crop, len(self.mean))
        except UnreadableImage as error:
            raise UsageError(f"an image cannot be preprocessed: {error}") from error


def _picture(array: np.ndarray) -> Image.Image:
    """Converts an array [H, W] or [H, W, C] to a grey or RGB picture."""
    rule = "pass PIL images or arrays [H, W, C] with 1 or 3 channels, uint8 or floats in 0..1"
    grey = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if not (grey.ndim == 2 or (grey.ndim == 3 and grey.shape[-1] == 3)):
        raise UsageError(f"an image of shape {array.shape} cannot be preprocessed: {rule}")
    if np.issubdtype(grey.dtype, np.floating):
        if not (grey.size and grey.min() >= 0 and grey.max() <= 1):
            raise UsageError(f"a floating-point image is empty or has values outside 0..1: {rule}")
        grey = np.round(255 * grey.astype(np.float32)).astype(np.uint8)
    if grey.dtype != np.uint8:
        raise UsageError(f"an image of dtype {array.dtype} cannot be preprocessed: {rule}")
    return Image.fromarray(grey)
