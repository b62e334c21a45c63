"""Images of a data set in, batches of pixels out, decoded ahead of the network by a few threads.

Decoding and resizing release the interpreter's lock, so threads are enough, and nothing is copied between processes.
Read in this order: ViewSpec, decoded_batches.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from data.datasets import Dataset
from data.decode import DecodeError
from data.errors import InputError
from data.preprocess import Preprocess, center_view, check_view_px, fit_view, whole_view

View = Literal["center", "whole", "fit"]
"""`center`: resize and centre crop, as embeddings are served. `whole`: the whole image squashed to a square, as maps and
depth are. `fit`: the whole image with its own aspect, shrunk until its long side fits."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """What the network gets to see of an image."""

    view: View = "center"
    size_px: int | None = None
    """Side of a `whole` view, longest side of a `fit` view; None: what the network's preprocessing says. For `center`,
    always None."""
    resize_px: int | None = None
    """What the short side becomes before a `center` view is cut out; None: what the preprocessing says."""

    def __post_init__(self) -> None:
        if self.size_px is not None:
            check_view_px(self.size_px, "--size-px")
            if self.view == "center":
                raise InputError(
                    "a centre view has the size of the network's preprocessing; size_px is for whole views"
                )

    def make(self, image_HWC: np.ndarray, preprocess: Preprocess) -> np.ndarray:
        """The view of one image, normalised float32 [3, H, W]."""
        if self.view == "center":
            return center_view(image_HWC, preprocess)
        if self.view == "whole":
            return whole_view(image_HWC, preprocess, self.size_px)
        return fit_view(image_HWC, preprocess, self.size_px or preprocess.whole_px)

    def to_json(self) -> dict[str, Any]:
        """What a cache key and a result say of the view; fields that are not set are left out."""
        fields = {"view": self.view, "view_size_px": self.size_px, "view_resize_px": self.resize_px}
        return {name: value for name, value in fields.items() if value is not None}


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
    if view.resize_px is not None:
        preprocess = with_resize(preprocess, view.resize_px)
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


def with_resize(preprocess: Preprocess, resize_px: int) -> Preprocess:
    """The same preprocessing with another size of the short side."""
    return Preprocess.from_json(preprocess.to_json() | {"resize_px": resize_px})


def _decode(dataset: Dataset, preprocess: Preprocess, view: ViewSpec, start: int, stop: int) -> Batch:
    views: list[np.ndarray] = []
    skipped: dict[int, str] = {}
    for row in range(start, stop):
        try:
            views.append(view.make(dataset.image(row), preprocess))
        except DecodeError as error:
            skipped[row] = error.reason
    return Batch(start, stop, views, skipped)
