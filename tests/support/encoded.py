"""Images encoded in a file format."""

import io

from PIL import Image

from dino_jax.data.decode import open_image


def encoded(image: Image.Image, format_: str, **options: object) -> Image.Image:
    """Saves an image in a format and opens it again."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return open_image(file)
