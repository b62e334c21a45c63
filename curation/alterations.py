"""An image in, a near-duplicate of it out: what people and web sites do to pictures, for measuring who finds them again."""

from collections.abc import Callable

import cv2
import numpy as np

Alter = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def crop(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part of 60 to 85 % of each side."""
    height, width = image_HWC.shape[:2]
    tall, wide = (max(1, round(side * rng.uniform(0.6, 0.85))) for side in (height, width))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    return image_HWC[top : top + tall, left : left + wide].copy()


def resize(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third to two thirds of each side."""
    scale = rng.uniform(0.33, 0.67)
    height, width = image_HWC.shape[:2]
    return cv2.resize(
        image_HWC, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )


def recompress(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 10 to 30."""
    quality = int(rng.integers(10, 31))
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None, "it was encoded just now"
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored left and right."""
    return np.ascontiguousarray(image_HWC[:, ::-1])


def colour(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each channel brighter or darker by up to 40 %."""
    return np.clip(image_HWC * rng.uniform(0.6, 1.4, 3), 0, 255).astype(np.uint8)


def text(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A line of words across it."""
    out = image_HWC.copy()
    height, width = out.shape[:2]
    size = width / 160
    at = (int(width * 0.05), int(height * rng.uniform(0.2, 0.9)))
    for shade, thick in ((0, 3), (255, 1)):
        cv2.putText(
            out,
            "shared by many",
            at,
            cv2.FONT_HERSHEY_SIMPLEX,
            size,
            (shade,) * 3,
            max(1, round(thick * size * 1.5)),
            cv2.LINE_AA,
        )
    return out


ALTERATIONS: dict[str, Alter] = {
    "crop": crop,
    "resize": resize,
    "recompress": recompress,
    "flip": flip,
    "colour": colour,
    "text": text,
}
