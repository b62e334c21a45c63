"""The Semantic Boundaries Dataset as distributed, beside PASCAL VOC 2012: the training masks that it adds (Hariharan et al. 2011).

    benchmark_RELEASE/dataset/    img/NAME.jpg, cls/NAME.mat, train.txt, val.txt; also as SBD/ or sbd/; in VOC's folder or up to two above

With VOC's own training list, and without its validation images, some of which are in both of its lists, they make the 10,582 images of
`trainaug`.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.decode import DEFAULT_LIMITS
from data.errors import InputError

PLACES = ("benchmark_RELEASE/dataset", "SBD", "sbd", "SBD/benchmark_RELEASE/dataset")
MAT_HEAD = b"MATLAB 5.0 MAT-file"


def find_boundaries(voc: Path) -> Path | None:
    """The folder that holds cls/ with its lists, if it lies beside VOC's."""
    above = (voc, *list(voc.resolve().parents)[:2])
    found = (folder / place for folder in above for place in PLACES)
    return next((one for one in found if (one / "cls").is_dir() and (one / "train.txt").is_file()), None)


def enlarged_training(tested: Sequence[str], *lists: Sequence[str]) -> list[str]:
    """The images of all lists, each once, without those that VOC's validation tests."""
    excluded = set(tested)
    return list(dict.fromkeys(name for one in lists for name in one if name not in excluded))


def decode_mat(data: bytes, name: str) -> np.ndarray:
    """Classes int32 [H, W] of a file of cls/. Raises InputError."""
    from scipy.io import loadmat  # large, and needed for such files alone

    try:
        values = np.asarray(loadmat(io.BytesIO(data), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # whatever a damaged file makes the library raise
        raise InputError(
            f"{name}: its mask is no .mat file of the Semantic Boundaries Dataset ({type(error).__name__})"
        ) from error
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.size > DEFAULT_LIMITS.max_pixels:
        raise InputError(f"{name}: its mask holds {values.dtype} {list(values.shape)}; wanted a class a pixel")
    return values.astype(np.int32)
