"""The bytes of an image in, its size as it is decoded out, from its header."""

import io

from PIL import Image

from data.errors import InputError

EXIF_ORIENTATION = 274
QUARTER_TURNS = (5, 6, 7, 8)


def upright_hw(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of an image as it is decoded: turned where its EXIF says so. Raises InputError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name}: its header cannot be read ({error})") from error
    return (width, height) if turned else (height, width)
