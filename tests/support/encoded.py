"""Pictures as files hold them."""

import io

from PIL import Image

from dino_jax.data.decode import open_image


def encoded(image: Image.Image, format_: str, **options: object) -> Image.Image:
    """The picture as it is opened from a file of this format."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return open_image(file)
