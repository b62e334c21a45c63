"""Images with masks in: any set named on a command line, as objects (attention) or as classes (segmentation).

    images/train/a.jpg + masks/train/a.png    two folders with files of the same names; train/ and val/ if there are splits;
                                              names of classes 0, 1, ... in classes.txt, one a line, if they are wanted
    NAME.csv beside NAME.zip, a CSV, tars     with a further file an image: `masks`, `sem` or `instances`
    voc2012:ROOT                              VOCdevkit/VOC2012 (or ROOT itself): JPEGImages, SegmentationClass, -Object; with the training
                                              masks of SegmentationClassAug, or of the Semantic Boundaries Dataset, where they are there
    ade20k:ROOT                               ADEChallengeData2016 (or ROOT itself): images, annotations
    cityscapes:ROOT                           leftImg8bit and gtFine, both unpacked in ROOT; masks of labelIds, or, where they are
                                              not, of labelTrainIds (as its authors' tool makes them)

The benchmarks are also known by their folders, without the prefix; ADE20K's are so like anybody's that it has to show in a name, too
(`is_ade`), and is the first form otherwise. Nothing is decoded before it is asked for.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
from PIL import Image

from data.datasets import Dataset, open_dataset
from data.decode import DEFAULT_LIMITS
from data.errors import InputError
from data.listings import IMAGE, Item, Record, images_under, scan_folder
from data.members import Member
from evaluators.image_sizes import upright_hw
from evaluators.voc_boundaries import MAT_HEAD, decode_mat, enlarged_training, find_boundaries

Purpose = Literal["objects", "classes"]
"""`objects`: each thing its own number. `classes`: numbers that mean the same in every image."""
MaskValues = Literal["auto", "foreground", "ids"]
"""What the values of a mask mean: bright is foreground, or numbers. `auto`: palettes and the kinds below are numbers."""
Coding = Literal["palette", "grey", "lossy"]
KINDS: dict[Purpose, tuple[str, ...]] = {"objects": ("masks", "instances"), "classes": ("sem", "masks")}
"""Kinds of member that are looked for, in this order."""
NUMBERED = ("sem", "instances")
NOT_ADE = "{data}: read as masks of classes 0, 1, ... (255: void); if it is ADE20K, whose classes count from 1, name it ade20k:{data}"
VOID = -1
"""In a mask that was read: belongs to nothing that is scored."""
VOID_VALUE = 255
FOREGROUND_FROM = 128
"""Of an alpha mask of 0 to 255."""
ROOM_CLASSES = (
    *("floor", "wall", "person", "plant", "sofa", "chair", "bed", "table", "storage", "lamp", "vehicle", "sanitary"),
    *("appliance", "tableware", "opening"),
)
"""Values 1 to 15 of the packed set `rooms`; 0 is nothing."""
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Names of the ids that are scored; all others are void."""


@dataclass(frozen=True)
class MaskedImages:
    """Images with one mask each."""

    dataset: Dataset
    kind: str
    """Kind of the mask's member."""
    numbered: bool | None
    """Whether values are numbers; None: told by each mask itself (a palette means numbers)."""
    zero_is_void: bool = False
    """ADE20K, rooms: 0 is no class, and classes count from 1."""
    ids: tuple[int, ...] = ()
    """Cityscapes: the values that are classes 0, 1, ...; all others are void. Empty: values are classes."""
    classes: tuple[str, ...] = ()
    """Names of the classes where the set has them; the first is number 0 of a mask that was read."""
    source: str = ""
    """Which form it is, in words."""
    notes: tuple[str, ...] = ()
    """What a result has to say of how it was read."""

    def subset(self, rows: Sequence[int]) -> "MaskedImages":
        """Some of its rows."""
        return dataclasses.replace(self, dataset=self.dataset.subset(rows))

    def mask(self, row: int, image_hw: tuple[int, int] | None = None) -> np.ndarray:
        """int32 [H, W]: numbers (foreground: 1), `VOID` where nothing is scored. Raises InputError, also where the mask is
        not of `image_hw`."""
        name = self.dataset.items[row].name
        values, coding = decode_mask(self.dataset.read_member(row, self.kind), name)
        if image_hw is not None and values.shape != image_hw:
            raise InputError(
                f"{name}: its mask has {values.shape[1]} x {values.shape[0]} pixels, the image {image_hw[1]} x "
                f"{image_hw[0]}; wanted the same size, and the image without a rotation noted in its EXIF"
            )
        numbered = coding == "palette" if self.numbered is None else self.numbered
        if numbered and coding == "lossy":
            raise InputError(f"{name}: its mask is a JPEG, whose values are not exact; wanted numbers in a PNG")
        if not numbered:
            return ((values >= FOREGROUND_FROM) | (values == 1) & (values.max() == 1)).astype(np.int32)
        if self.ids:
            class_of = np.full(values.max(initial=max(self.ids)) + 1, VOID, np.int32)
            class_of[list(self.ids)] = np.arange(len(self.ids))
            return class_of[values]
        mask: np.ndarray = values - 1 if self.zero_is_void else values.copy()
        mask[values == VOID_VALUE] = VOID
        if self.zero_is_void and mask.max(initial=VOID) >= len(self.classes):
            raise InputError(
                f"{name}: its mask holds {mask.max() + 1}; wanted 0 for nothing, 1 to {len(self.classes)}, the classes of "
                f"{self.source}, or 255 for void"
                + "; name a set of your own without ade20k:"
                * (self.source == "ADE20K")
            )
        return mask

    def image_hw(self, row: int) -> tuple[int, int]:
        """Height and width of an image as it is decoded, told by its header. Raises InputError."""
        return upright_hw(self.dataset.read(row), self.dataset.items[row].name)

    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; where the set has none, as many numbers as its masks hold (which are all read)."""
        if self.classes:
            return self.classes
        highest = max((int(self.mask(row).max(initial=VOID)) for row in range(len(self.dataset))), default=VOID)
        if highest >= VOID_VALUE:
            raise InputError(
                f"{self.dataset.name}: a mask holds class {highest}; wanted classes 0 to 254, 255 for void"
            )
        return tuple(f"class {number}" for number in range(highest + 1))

    def truth_fingerprint(self) -> str:
        """As `Dataset.fingerprint`, of the masks."""
        records = [Record(one.item, {IMAGE: one.members[self.kind]}) for one in self.dataset._records]
        return Dataset(records).fingerprint()


class Masks(Sequence[np.ndarray]):
    """The masks of some rows of a set, read and checked against their images when they are asked for."""

    def __init__(self, images: MaskedImages, rows: Sequence[int]) -> None:
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Masks": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Masks":
        if isinstance(index, slice):
            return Masks(self._images, self._rows[index])
        row = self._rows[index]
        return self._images.mask(row, self._images.image_hw(row))


def decode_mask(data: bytes, name: str) -> tuple[np.ndarray, Coding]:
    """Values int32 [H, W] and what they may be: of RGBA the alpha, of a bit mask 0 and 1. JPEG holds no exact values."""
    if data.startswith(MAT_HEAD):
        return decode_mat(data, name), "palette"
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
            if image.width * image.height > DEFAULT_LIMITS.max_pixels:
                raise InputError(f"{name}: its mask has {image.width} x {image.height} pixels, more than allowed")
            if image.mode in ("RGBA", "LA"):
                return np.asarray(image.getchannel("A")).astype(np.int32), "grey"
            if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                raise InputError(
                    f"{name}: its mask is of mode {image.mode}; wanted one value a pixel (a palette, grey, or alpha)"
                )
            coding: Coding = "lossy" if image.format == "JPEG" else "palette" if image.mode == "P" else "grey"
            return np.asarray(image).astype(np.int32), coding
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: its mask is no PNG that can be decoded ({error})") from error


def open_masks(data: str | Path, purpose: Purpose, values: MaskValues = "auto") -> MaskedImages:
    """Open a set for a purpose; see the head of this file. Raises InputError where an image has no mask."""
    name, _, rest = str(data).partition(":")
    if name in BENCHMARKS and rest:
        benchmark, root = name, Path(rest)
    else:
        root = Path(data)
        found_at = {name: find(root) for name, (_, find) in BENCHMARKS.items()}
        like_ade = found_at["ade20k"]
        if like_ade is not None and not is_ade(like_ade):
            found_at["ade20k"] = None
        benchmark = next((name for name, found in found_at.items() if found is not None), "")
    if benchmark:
        open_it, find = BENCHMARKS[benchmark]
        found = find(root)
        if found is None:
            raise InputError(f"{data}: nothing there that looks like {benchmark}; wanted its folders as distributed")
        return open_it(found, purpose)
    folders = next((kind for kind in (*KINDS[purpose], "annotations") if (root / kind).is_dir()), None)
    if (root / "images").is_dir() and folders:
        dataset = folder_pair(root, folders)
        kind = folders
    else:
        dataset = open_dataset(data)
        kind = next((kind for kind in KINDS[purpose] if kind in dataset.kinds), "")
    if not kind:
        raise InputError(
            f"{data}: not every image has a mask (kinds: {', '.join(dataset.kinds)}); wanted PNG masks: images/ with "
            f"masks/, a CSV column `masks`, a packed set, or one of {', '.join(f'{name}:ROOT' for name in BENCHMARKS)}"
        )
    numbered = {"foreground": False, "ids": True}.get(
        values, True if kind in NUMBERED or purpose == "classes" else None
    )
    rooms = is_rooms(dataset, kind)
    names = ROOM_CLASSES if rooms else listed_names(root / "classes.txt")
    notes = (NOT_ADE.format(data=data),) if kind == "annotations" and find_ade(root) is not None else ()
    return MaskedImages(
        dataset, kind, numbered, zero_is_void=rooms, classes=names, source=f"{kind} of {data}", notes=notes
    )


def is_rooms(dataset: Dataset, kind: str) -> bool:
    """Whether a set is the packed `rooms`, in whose masks 0 is nothing."""
    return kind == "sem" and bool(dataset.items) and "floor" in dataset.items[0].row


def listed_names(path: Path) -> tuple[str, ...]:
    """Names of the classes from a file with one a line, beside images/; none where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted the name of a class a line") from error
    return tuple(line.strip() for line in lines if line.strip())


def folder_pair(root: Path, kind: str) -> Dataset:
    """`images/` and the folder `kind/`, which holds a .png of the same name for each image, as one set."""
    records = []
    for record in scan_folder(root / "images"):
        mask = (root / kind / record.item.name).with_suffix(".png")
        if not mask.is_file():
            raise InputError(f"{mask}: nothing there; wanted the mask of images/{record.item.name}")
        records.append(Record(record.item, {IMAGE: record.members[IMAGE], kind: Member(str(mask))}))
    return Dataset(records, name=str(root))


def find_voc(root: Path) -> Path | None:
    """The folder that holds JPEGImages/ and ImageSets/Segmentation/."""
    places = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((p for p in places if (p / "JPEGImages").is_dir() and (p / "ImageSets/Segmentation").is_dir()), None)


def open_voc(root: Path, purpose: Purpose) -> MaskedImages:
    """PASCAL VOC 2012; the larger training set (trainaug, 10,582) where SegmentationClassAug/ with its list is there, or the Semantic
    Boundaries Dataset, out of which it was made."""
    lists = root / "ImageSets" / "Segmentation"
    folder = "SegmentationObject" if purpose == "objects" else "SegmentationClass"
    train = "train"
    augmented = (root / "SegmentationClassAug").is_dir() and (lists / "trainaug.txt").is_file()
    if purpose == "classes" and augmented:
        folder, train = "SegmentationClassAug", "trainaug"
    paths = {split: lists / f"{listed}.txt" for split, listed in (("train", train), ("val", "val"))}
    names = {split: read_voc_names(path) if path.is_file() else [] for split, path in paths.items()}
    added = find_boundaries(root) if purpose == "classes" and not augmented else None
    if added is not None:
        more = [read_names(path) for path in (added / "train.txt", added / "val.txt") if path.is_file()]
        names["train"] = enlarged_training(names["val"], names["train"], *more)
    records = []
    for split, listed in names.items():
        for name in listed:
            image, mask = root / "JPEGImages" / f"{name}.jpg", root / folder / f"{name}.png"
            if split == "val" and purpose == "classes" and (root / "SegmentationClass" / mask.name).is_file():
                mask = root / "SegmentationClass" / mask.name  # the added masks are coarser
            if added is not None and not mask.is_file():
                image, mask = (image if image.is_file() else added / "img" / image.name), added / "cls" / f"{name}.mat"
            records.append(listed_record(name, split, image, "masks", mask, paths[split]))
    if not records:
        raise InputError(f"{lists}: no train.txt or val.txt with names in it; wanted VOC2012 as distributed")
    dataset = Dataset(records, name=str(root))
    source = f"PASCAL VOC 2012, {folder}" + (", Semantic Boundaries Dataset" if added is not None else "")
    return MaskedImages(dataset, "masks", True, classes=VOC_CLASSES, source=source)


def find_ade(root: Path) -> Path | None:
    """The folder that holds images/validation and annotations/validation."""
    places = (root, root / "ADEChallengeData2016")
    return next((p for p in places if all((p / k / "validation").is_dir() for k in ("images", "annotations"))), None)


def is_ade(root: Path) -> bool:
    """Whether such a folder is ADE20K by its name, its list of classes, or the names of its images."""
    named = root.name == "ADEChallengeData2016" or (root / "objectInfo150.txt").is_file()
    return named or any((root / "images" / "validation").glob("ADE_val_*"))


def open_ade(root: Path, purpose: Purpose) -> MaskedImages:
    """ADE20K (scene parsing, 150 classes): 0 is unlabelled, classes count from 1; the list of names is optional."""
    if purpose == "objects":
        raise InputError(f"{root}: ADE20K as distributed has classes, no objects; wanted a set with object masks")
    records = []
    for record in scan_folder(root / "images"):
        mask = (root / "annotations" / record.item.name).with_suffix(".png")
        image = Path(record.members[IMAGE].path)
        records.append(listed_record(record.item.name, record.item.split, image, "masks", mask, root))
    dataset = Dataset(records, name=str(root))
    return MaskedImages(
        dataset, "masks", True, zero_is_void=True, classes=ade_names(root / "objectInfo150.txt"), source="ADE20K"
    )


def ade_names(path: Path) -> tuple[str, ...]:
    """First name of each of the 150 classes; without the list, their numbers."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, UnicodeDecodeError):
        return tuple(f"class {number}" for number in range(1, 151))
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    return tuple(names) if len(names) == 150 else tuple(f"class {number}" for number in range(1, 151))


def find_cityscapes(root: Path) -> Path | None:
    """The folder that holds leftImg8bit/val and gtFine/val."""
    return root if all((root / kind / "val").is_dir() for kind in ("leftImg8bit", "gtFine")) else None


def open_cityscapes(root: Path, purpose: Purpose) -> MaskedImages:
    """Cityscapes, fine annotations: 2,975 training and 500 validation images of 19 classes; those of its test set are not public."""
    if purpose == "objects":
        raise InputError(f"{root}: Cityscapes is read as classes, and has classes, no objects; wanted object masks")
    records = []
    kinds = [kind for kind in ("labelIds", "labelTrainIds") if any((root / "gtFine").glob(f"*/*/*_gtFine_{kind}.png"))]
    suffix = kinds[0] if kinds else "labelIds"
    for split in ("train", "val"):
        for image in images_under(root / "leftImg8bit" / split) if (root / "leftImg8bit" / split).is_dir() else []:
            name = image.relative_to(root / "leftImg8bit").as_posix()
            mask = root / "gtFine" / name.replace("_leftImg8bit.png", f"_gtFine_{suffix}.png")
            record = listed_record(name, split, image, "masks", mask, root / "leftImg8bit")
            # a city is a scene: images of one film must not be on both sides of a choice
            records.append(Record(Item(name, None, split, {"scene": image.parent.name}), record.members))
    dataset = Dataset(records, name=str(root))
    ids = tuple(range(len(CITYSCAPES))) if suffix == "labelTrainIds" else tuple(CITYSCAPES)
    return MaskedImages(
        dataset, "masks", True, ids=ids, classes=tuple(CITYSCAPES.values()), source=f"Cityscapes, gtFine, {suffix}"
    )


def read_names(path: Path) -> list[str]:
    """First word of each line of a list. Raises InputError for one that leads out of the set's folder."""
    return _inside(_first_words(path), path)


def read_voc_names(path: Path) -> list[str]:
    """Names of images in a list of VOC: one a line, or paths of image and mask, `/JPEGImages/NAME.jpg ...`, as trainaug.txt comes too.

    Raises InputError for one that leads out of the set's folder.
    """
    # the slash in front stands for the set's own folder
    words = _inside([word.removeprefix("/") for word in _first_words(path)], path)
    return [Path(word).stem if "/" in word else word for word in words]


def _first_words(path: Path) -> list[str]:
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted a name a line") from error
    return [line[0] for line in words if line]


def _inside(names: list[str], path: Path) -> list[str]:
    for name in names:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise InputError(f"{path}: {name!r:.80} climbs out of the set's folder; wanted names of files in it")
    return names


def listed_record(name: str, split: str | None, image: Path, kind: str, truth: Path, source: Path) -> Record:
    """One row of a list, both of whose files must be there."""
    for path in (image, truth):
        if not path.is_file():
            raise InputError(f"{path}: nothing there, though {source} lists {name}; unpack the set again")
    return Record(Item(name, None, split), {IMAGE: Member(str(image)), kind: Member(str(truth))})


BENCHMARKS: dict[str, tuple[Callable[[Path, Purpose], MaskedImages], Callable[[Path], Path | None]]] = {
    "voc2012": (open_voc, find_voc),
    "ade20k": (open_ade, find_ade),
    "cityscapes": (open_cityscapes, find_cityscapes),
}
"""Prefix of `--data` to what opens the set, and what finds its folder."""
