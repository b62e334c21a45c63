"""ImageNet-1k as it is distributed in, rows out; classes are WordNet ids such as n01440764, in every form.

    ROOT/train/WNID/*.JPEG, or ROOT/train/WNID.tar as the training archive unpacks
    ROOT/val/WNID/*.JPEG, ROOT/val/*.JPEG, or ROOT/ILSVRC2012_img_val.tar; without class folders, one of
        ILSVRC2012_validation_ground_truth.txt and meta.mat of the development kit, in ROOT or in a folder of ROOT
        LOC_val_solution.csv, as Kaggle has it
    ROOT/ILSVRC/Data/CLS-LOC/train and val: Kaggle's folders

A set with only one of the two parts is fine. Images are listed, not read.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from data.errors import InputError
from data.listings import IMAGE, Item, Record, file_records, is_image_name
from data.members import Member, list_tar

PREFIX = "imagenet:"
TRUTH, META, KAGGLE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
VAL_TAR = "ILSVRC2012_img_val.tar"
_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")


def scan_imagenet(root: Path) -> list[Record]:
    """Rows of both parts that are there. Raises InputError where none is, or where the labels of flat images cannot be found."""
    places = [root, root / "ILSVRC" / "Data" / "CLS-LOC", root / "Data" / "CLS-LOC"]
    base = next((one for one in places if (one / "train").is_dir() or (one / "val").is_dir()), root)
    records = [*_train(base / "train"), *_val(base, root)]
    if not records:
        raise InputError(
            f"{PREFIX}{root}: no images; wanted train/WNID/*.JPEG and val/, or Kaggle's ILSVRC/Data/CLS-LOC, in that folder"
        )
    return records


def _train(folder: Path) -> Iterator[Record]:
    if not folder.is_dir():
        return
    for place in sorted(folder.iterdir()):
        if place.is_dir() and _WNID.fullmatch(place.name):
            yield from file_records(folder.parent, place, place.name, "train")
        elif place.suffix == ".tar" and _WNID.fullmatch(place.stem) and not (folder / place.stem).is_dir():
            for name, member in list_tar(place):
                if is_image_name(name):
                    yield Record(Item(f"train/{place.stem}/{name}", place.stem, "train"), {IMAGE: member})
        elif place.is_dir() and not place.name.startswith("."):
            raise InputError(f"{place}: no class of ImageNet; wanted folders such as n01440764")


def _val(base: Path, root: Path) -> Iterator[Record]:
    folder, archive = base / "val", root / VAL_TAR
    if folder.is_dir():
        below = sorted(folder.iterdir())
        flat = [path for path in below if is_image_name(path.name) and path.is_file()]
        classes = [path for path in below if _WNID.fullmatch(path.name) and path.is_dir()]
        if flat and classes:
            raise InputError(f"{folder}: it mixes class folders ({classes[0].name}/) with images ({flat[0].name})")
        strange = [
            path.name for path in below if path.is_dir() and path not in classes and not path.name.startswith(".")
        ]
        if strange:
            raise InputError(
                f"{folder / strange[0]}: no class of ImageNet; wanted folders such as n01440764, or images"
            )
        for one in classes:
            yield from file_records(base, one, one.name, "val")
        images = [(path.name, Member(str(path))) for path in flat]
    else:
        images = (
            [(name, member) for name, member in list_tar(archive) if is_image_name(name)] if archive.is_file() else []
        )
    if images:
        label_of = _labels(root, base)
        for name, member in images:
            yield Record(Item(f"val/{name}", label_of(name), "val"), {IMAGE: member})


def _labels(root: Path, base: Path) -> Callable[[str], str]:
    """The class of a validation image by its file's name. Raises InputError."""
    near = [*dict.fromkeys((root, base, root.parent))]
    kaggle = _found(KAGGLE, near)
    if kaggle is not None:
        known = _kaggle_labels(kaggle)
        return lambda name: _of(known, Path(name).stem, kaggle)
    truth, meta = _found(TRUTH, near), _found(META, near)
    if truth is None or meta is None:
        raise InputError(
            f"{PREFIX}{root}: its validation images lie without class folders, and {META if truth else TRUTH} is not there; wanted "
            f"{TRUTH} and {META} (ILSVRC2012_devkit_t12/data), or {KAGGLE}, in {root}"
        )
    by_number = _devkit_labels(truth, meta)

    def label(name: str) -> str:
        found = _VAL_NAME.search(name)
        return _of(by_number, found[1] if found else name, truth)

    return label


def _of(labels: Mapping[str, str], key: str, path: Path) -> str:
    if key not in labels:
        raise InputError(f"{path}: it has no label for validation image {key!r:.80} ({len(labels)} are listed)")
    return labels[key]


def _found(name: str, folders: list[Path]) -> Path | None:
    """A file in one of these folders, or two below the first."""
    below = (path for pattern in (f"*/{name}", f"*/*/{name}") for path in sorted(folders[0].glob(pattern)))
    return next((folder / name for folder in folders if (folder / name).is_file()), None) or next(below, None)


def _kaggle_labels(path: Path) -> dict[str, str]:
    """`ImageId,PredictionString`; the string begins with the WordNet id."""
    try:
        with path.open(newline="") as file:
            rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError, IndexError, TypeError) as error:
        raise InputError(f"{path}: {type(error).__name__} {error}; wanted ImageId,PredictionString") from error
    return rows


def _devkit_labels(truth: Path, meta: Path) -> dict[str, str]:
    """By the eight digits of a validation image's name. Line k of the ground truth is the ILSVRC id of image k."""
    wnids = _synsets(meta)
    try:
        numbers = [int(line) for line in truth.read_text().split()]
        return {f"{place:08d}": wnids[number] for place, number in enumerate(numbers, start=1)}
    except (OSError, ValueError) as error:
        raise InputError(f"{truth}: wanted a number a line, as in the development kit ({error})") from error
    except KeyError as error:
        raise InputError(f"{truth}: class {error} is not in {meta.name}; wanted 1 to {len(wnids)}") from error


def _synsets(meta: Path) -> dict[int, str]:
    """WordNet ids by ILSVRC id, of the classes without children: a thousand in the published file."""
    from scipy.io import loadmat  # large, and needed for such files alone

    try:
        synsets = loadmat(str(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets if int(one["num_children"]) == 0}
    except Exception as error:  # whatever a damaged file makes the library raise
        raise InputError(
            f"{meta}: cannot be read ({type(error).__name__}); wanted meta.mat of ILSVRC2012_devkit_t12"
        ) from error
