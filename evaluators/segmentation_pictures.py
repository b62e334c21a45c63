"""Predicted classes in, files out: a palette PNG for each image, in the numbers of the set, and a sheet to look at."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import InputError
from evaluators.picture_sheet import number_colours, numbers_over, save_sheet, spread_picks
from evaluators.results import replacing
from evaluators.segmentation_data import MaskedImages


def picture_path(out: Path) -> Path:
    """The picture beside a result file."""
    return out.with_suffix(".png")


def masks_path(out: Path) -> Path:
    """The folder of masks beside a result file."""
    return out.with_suffix(".masks")


def save_masks(folder: Path, names: Sequence[str], predicted: Sequence[np.ndarray], images: MaskedImages) -> None:
    """NAME.png for each image, in the set's own numbers, as its masks have them. Raises InputError where they cannot be written."""
    own_numbers = np.array(images.ids or np.arange(256) + images.zero_is_void).astype(np.uint8)
    palette = number_colours().flatten().tolist()
    try:
        for name, classes_HW in zip(names, predicted, strict=True):
            path = (folder / Path(name.lstrip("/"))).with_suffix(".png")
            if folder.resolve() not in path.resolve().parents:
                raise InputError(f"--out: {name!r} is no name of a file in {folder}")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(own_numbers[classes_HW])
            picture.putpalette(palette)
            body = io.BytesIO()
            picture.save(body, "PNG")
            with replacing(path) as scratch:
                scratch.write_bytes(body.getvalue())
    except OSError as error:
        raise InputError(f"--out: cannot write {folder} ({error.strerror}); name another place") from error


def save_pictures(
    path: Path, images: MaskedImages, names: Sequence[str], predicted: Sequence[np.ndarray], scores_n: np.ndarray
) -> None:
    """Rows of image, truth and prediction, from the worst image to the best; what does not count is grey in the truth."""
    index = {item.name: row for row, item in enumerate(images.dataset.items)}
    rows = []
    for pick in spread_picks(scores_n):
        row = index[names[pick]]
        image, truth = images.dataset.image(row), images.mask(row)
        # one up, so that class 0 has a colour as well
        tiles = [
            image,
            numbers_over(image, np.where(truth < 0, -1, truth + 1)),
            numbers_over(image, predicted[pick] + 1),
        ]
        rows.append((f"{names[pick]}   mean IoU in this image {scores_n[pick]:.3f}", tiles))
    save_sheet(path, rows)
