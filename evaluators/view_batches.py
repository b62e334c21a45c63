"""Images of a data set in, batches of pixels out, decoded ahead of the network by a few threads.

Decoding and resizing release the interpreter's lock, so threads are enough, and nothing is copied between processes.
Read in this order: ViewSpec, decoded_batches.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from data.datasets import Dataset
from data.decode import DecodeError
from data.errors import InputError
from data.preprocess import Interpolation, Preprocess, box_view, center_view, check_view_px, fit_view, whole_view

View = Literal["center", "whole", "fit", "random"]
"""`center`: resize and centre crop, as embeddings are served. `whole`: the whole image squashed to a square, as maps and
depth are. `fit`: the whole image with its own aspect, shrunk until its long side fits. `random`: a random part of it, flipped or
not, as linear probes are trained on; always the same one for an image's name and the view's number."""
CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of random views: share of the image's area, and width by height (Szegedy et al. 2015)."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """What the network gets to see of an image."""

    view: View = "center"
    size_px: int | None = None
    """Side of a `whole` view, longest side of a `fit` view; None: what the network's preprocessing says. For `center`,
    always None."""
    resize_px: int | None = None
    """What the short side becomes before a `center` view is cut out; None: what the preprocessing says."""

    number: int = 0
    """Which of the random views."""
    interpolation: Interpolation | None = None
    """Filter of random views; None: what the preprocessing says."""

    def __post_init__(self) -> None:
        if self.size_px is not None:
            check_view_px(self.size_px, "--size-px")
            if self.view in ("center", "random"):
                raise InputError(
                    "a centre view has the size of the network's preprocessing; size_px is for whole views"
                )

    def make(self, image_HWC: np.ndarray, preprocess: Preprocess, name: str = "") -> np.ndarray:
        """The view of one image, normalised float32 [3, H, W]; `name` decides what a random view shows."""
        if self.view == "center":
            return center_view(image_HWC, preprocess)
        if self.view == "random":
            digest = hashlib.sha256(f"{self.number}/{name}".encode("utf-8", "surrogateescape")).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            box = random_box(image_HWC.shape[0], image_HWC.shape[1], rng)
            view_CHW = box_view(image_HWC, preprocess, box)
            return np.ascontiguousarray(view_CHW[:, :, ::-1]) if rng.random() < 0.5 else view_CHW
        if self.view == "whole":
            return whole_view(image_HWC, preprocess, self.size_px)
        return fit_view(image_HWC, preprocess, self.size_px or preprocess.whole_px)

    def to_json(self) -> dict[str, Any]:
        """What a cache key and a result say of the view; fields that are not set are left out."""
        fields: dict[str, Any] = {"view": self.view, "view_size_px": self.size_px, "view_resize_px": self.resize_px}
        if self.view == "random":
            fields |= {"view_number": self.number, "view_interpolation": self.interpolation}
        return {name: value for name, value in fields.items() if value is not None}


def random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of a part of random area and aspect; the middle part where ten draws do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = max(1, round(min(width, height * CROP_ASPECT[1])))
    h = max(1, round(min(height, width / CROP_ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class Batch:
    """Views of the readable images among rows `start` to `stop` of a data set."""

    start: int
    stop: int
    views: list[np.ndarray]
    """Normalised pixels [3, H, W] each; of one shape unless the view is `fit`."""
    skipped: dict[int, str]
    """Row and reason of each image that could not be decoded."""

    @property
    def rows(self) -> list[int]:
        """Rows of the data set that the views show."""
        return [row for row in range(self.start, self.stop) if row not in self.skipped]


def decoded_batches(
    dataset: Dataset, preprocess: Preprocess, view: ViewSpec, batch_size: int, first: int = 0, workers: int = 1
) -> Iterator[Batch]:
    """Yield the batches from row `first` on, in order; `workers` threads decode, each at most one batch ahead."""
    changes = {"resize_px": view.resize_px, "interpolation": view.interpolation}
    preprocess = replace(preprocess, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    starts = iter(range(first, len(dataset.items), batch_size))

    def decode(start: int) -> Batch:
        return _decode(dataset, preprocess, view, start, min(start + batch_size, len(dataset.items)))

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode") as pool:
        ahead: deque[Future[Batch]] = deque(pool.submit(decode, start) for start in islice(starts, workers))
        try:
            while ahead:
                ready = ahead.popleft().result()
                ahead.extend(pool.submit(decode, start) for start in islice(starts, 1))
                yield ready
        finally:
            for future in ahead:
                future.cancel()


def _decode(dataset: Dataset, preprocess: Preprocess, view: ViewSpec, start: int, stop: int) -> Batch:
    views: list[np.ndarray] = []
    skipped: dict[int, str] = {}
    for row in range(start, stop):
        try:
            views.append(view.make(dataset.image(row), preprocess, dataset.items[row].name))
        except DecodeError as error:
            skipped[row] = error.reason
    return Batch(start, stop, views, skipped)
