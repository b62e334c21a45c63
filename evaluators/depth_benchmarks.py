"""NYU Depth V2 and KITTI as distributed in, images with depth out, cut and scored as published.

    nyud:ROOT    as most use it, nyu_train.txt and nyu_test.txt (or BTS' names), lines `image depth focal`, 16-bit PNG in
                 millimetres; or, where they are not, nyu_depth_v2_labeled.mat and splits.mat as distributed by its authors (`nyud_mat`)
    kitti:ROOT   kitti_eigen_train.txt and kitti_eigen_test.txt (or BTS' names), raw drives and the annotated depth, 16-bit
                 PNG in 1/256 metres; lines whose depth is None (no measurement exists) are left out

Both are trained on a cut (NYUd without its white border, KITTI's lower 352 x 1216 pixels: "KB crop"). NYUd is tested on
whole images and scored in Eigen's crop; KITTI is tested on the same cut and scored in Garg's crop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.datasets import Dataset
from data.errors import InputError
from data.listings import IMAGE, Item, Record
from data.members import Member
from evaluators.depth_cuts import DEPTH, DEPTH_256, NYU_HW, CutDataset
from evaluators.nyud_mat import MAT, open_labelled

ScoredPart = Callable[[int, int], tuple[slice, slice]]
"""Height and width of a test map to the rows and columns that count."""
EIGEN_NYU = (slice(45, 471), slice(41, 601))
GARG = ((0.40810811, 0.99189189), (0.03594771, 0.96405229))
"""Shares of height and width between which KITTI is scored (Garg et al. 2016)."""


@dataclass(frozen=True)
class Benchmark:
    """One of them, opened."""

    dataset: Dataset
    max_depth: float
    scored: ScoredPart
    notes: list[str]


def eigen_nyu(height: int, width: int) -> tuple[slice, slice]:
    """Eigen's crop of NYUd. Raises InputError for maps of another size."""
    if (height, width) != NYU_HW:
        raise InputError(f"a NYUd test map has {width} x {height} pixels; wanted 640 x 480")
    return EIGEN_NYU


def garg_kitti(height: int, width: int) -> tuple[slice, slice]:
    """Garg's crop of a map of any size."""
    (top, bottom), (left, right) = GARG
    return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))


def open_nyud(root: Path) -> Benchmark:
    """NYU Depth V2: 24,231 training images by lists, or the labelled part's 795, and its 654 test images."""
    lists = {
        "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
        "val": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
    }
    # who made the lists' images cut those of the test out of the labelled part, and may have left it there
    if (root / MAT).is_file() and not all(_list_of(root, names) for names in lists.values()):
        note = "trained on the 795 images of the labelled part; published figures come from 24,231 frames"
        return Benchmark(open_labelled(root, {"train": "nyu"}), 10.0, eigen_nyu, [note])
    places = (
        "",
        "train",
        "test",
        "sync",
        "official_splits/test",
        "nyu_depth_v2/sync",
        "nyu_depth_v2/official_splits/test",
    )
    records, missing = _listed(root, lists, places, places, DEPTH)
    dataset = CutDataset(records, {"train": "nyu"}, str(root))
    return Benchmark(dataset, 10.0, eigen_nyu, _notes(missing))


def open_kitti(root: Path) -> Benchmark:
    """KITTI by Eigen's lists: 23,158 training images, 697 test images, of which 652 have a measurement."""
    lists = {
        "train": ("kitti_eigen_train.txt", "eigen_train_files_with_gt.txt"),
        "val": ("kitti_eigen_test.txt", "eigen_test_files_with_gt.txt"),
    }
    images = ("", "input", "raw", "kitti_raw")
    depths = (
        "",
        "gt_depth",
        "data_depth_annotated",
        "train",
        "val",
        "data_depth_annotated/train",
        "data_depth_annotated/val",
    )
    records, missing = _listed(root, lists, images, depths, DEPTH_256)
    dataset = CutDataset(records, {"train": "kitti", "val": "kitti"}, str(root))
    return Benchmark(dataset, 80.0, garg_kitti, _notes(missing))


def _notes(missing: int) -> list[str]:
    return [f"{missing} listed images have no depth (None) and were left out"] if missing else []


def _listed(
    root: Path, lists: Mapping[str, tuple[str, ...]], images: Sequence[str], depths: Sequence[str], kind: str
) -> tuple[list[Record], int]:
    """Rows of the lists, and how many name no depth. Raises InputError for a list or a file that is missing."""
    records: list[Record] = []
    missing = 0
    for split, names in lists.items():
        listed = _list_of(root, names)
        if listed is None:
            raise InputError(f"{root}: no {' or '.join(names)} there; wanted the list that the set is used by")
        for number, line in enumerate(_lines(listed), start=1):
            words = line.split()
            if not words:
                continue
            if len(words) < 2:
                raise InputError(f"{listed}, line {number}: {line.strip()!r:.80}; wanted `image depth focal`")
            if words[1] == "None":
                missing += 1
                continue
            image, depth = (
                _find(root, word, places, listed) for word, places in zip(words, (images, depths), strict=False)
            )
            name = words[0].lstrip("/")
            row = {"scene": str(Path(name).parent)}
            records.append(Record(Item(f"{split}/{name}", None, split, row), {IMAGE: image, kind: depth}))
    return records, missing


def _list_of(root: Path, names: Sequence[str]) -> Path | None:
    """The list of one of these names, if it is there."""
    paths = (root / folder / name for folder in ("", "splits") for name in names)
    return next((path for path in paths if path.is_file()), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted lines of `image depth focal`") from error


def _find(root: Path, word: str, places: Sequence[str], listed: Path) -> Member:
    """The file that a list names, with or without a leading slash, as .png or .jpg."""
    name = Path(word.lstrip("/"))
    if ".." in name.parts:
        raise InputError(f"{listed}: {word!r:.80} climbs out of the set's folder; wanted names of files in it")
    for place in places:
        for path in (root / place / name, (root / place / name).with_suffix(".jpg")):
            if path.is_file():
                return Member(str(path))
    raise InputError(f"{root}: no {name}, which {listed.name} lists; unpack the set into it")


BENCHMARKS: dict[str, Callable[[Path], Benchmark]] = {"nyud": open_nyud, "kitti": open_kitti}
"""Prefix of `--data` to what opens the set."""
