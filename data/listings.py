"""One data set on disk in, its rows out: a scan for each form, without decoding an image.

`scan_folder` (split and class folders, or plain), `scan_csv`. The forms that keep many images in one file are in
`data/packs.py`. Every function returns rows in a fixed order, whatever the file system's own.
"""

import csv
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from data.errors import InputError
from data.members import Member

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Words for a split, and the one we use."""
IMAGE = "image"
"""Kind of the member that is the image itself."""
FILE_COLUMNS = ("masks", "depth_mm", "sem", "instances", "disparity_x64")
"""Columns of a CSV that name a further file of the row."""

_NO_ROW: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a data set."""

    name: str
    """Unique in its set; with forward slashes."""
    label: str | None = None
    split: str | None = None
    """`train`, `val`, `test` or whatever the set calls it; None where it names none."""
    row: Mapping[str, str] = None  # type: ignore[assignment]
    """The row of the manifest, column to text; empty for a folder."""

    def __post_init__(self) -> None:
        if self.row is None:
            object.__setattr__(self, "row", _NO_ROW)


@dataclass(frozen=True, slots=True)
class Record:
    """An item and where its files lie, by kind; `image` is always there."""

    item: Item
    members: Mapping[str, Member]


def split_name(text: str | None) -> str | None:
    """The split's usual name: `validation` is `val`; nothing is None."""
    text = (text or "").strip()
    return SPLIT_NAMES.get(text.lower(), text) or None


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden files are not."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def scan_folder(root: Path) -> list[Record]:
    """Rows of a folder, by what lies in it.

    `train/` and `val/` (or `test/`, in any case) with class folders inside, or with images directly; two class folders
    or more; or anything else, recursively and without labels. One folder named like a split among others, all of them
    holding images directly, is a class. Raises InputError where it holds no image or mixes the forms.
    """
    images, folders = _entries(root)
    splits = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    _refuse_stray(root, images, splits)
    if splits and not images:
        others = [folder for folder in folders if folder not in splits and _has_images(folder)]
        if not others:
            return _scan_splits(root, splits)
        if len(splits) > 1 or any(_has_images(inner) for inner in _entries(splits[0])[1]):
            raise InputError(
                f"{root}: it mixes split folders ({splits[0].name}/) with others ({others[0].name}/); "
                "keep only train/ and val/ in it, or name the one folder that is meant"
            )
    if not images:
        with_images = [folder for folder in folders if _has_images(folder)]
        if len(with_images) >= 2:
            return [record for folder in with_images for record in _scan_class(root, folder, None)]
    records = file_records(root, root, None, None)
    if not records:
        raise InputError(f"{root}: no images in this folder; wanted files ending in {', '.join(IMAGE_SUFFIXES)}")
    return records


def _refuse_stray(folder: Path, images: list[Path], beside: list[Path]) -> None:
    """An image beside folders of images that mean something would lose them their meaning, splits among them. Raises InputError."""
    meant = next((one for one in beside if _has_images(one)), None) if images else None
    if meant is not None:
        raise InputError(
            f"{folder}: {images[0].name} lies beside the folder {meant.name}/; "
            "move such images into a folder, or out, so that it is clear what they belong to"
        )


def _scan_splits(root: Path, splits: list[Path]) -> list[Record]:
    records: list[Record] = []
    taken: dict[str, str] = {}
    for folder in splits:
        split = SPLIT_NAMES[folder.name.lower()]
        if split in taken:
            raise InputError(f"{root}: {taken[split]}/ and {folder.name}/ both mean split {split!r}; keep one of them")
        taken[split] = folder.name
        images, classes = _entries(folder)
        _refuse_stray(folder, images, classes)
        if images:
            records += file_records(root, folder, None, split)
        else:
            records += [record for inner in classes for record in _scan_class(root, inner, split)]
    if not records:
        raise InputError(f"{root}: no images under {', '.join(f'{name}/' for name in taken.values())}")
    return records


def _scan_class(root: Path, folder: Path, split: str | None) -> list[Record]:
    return file_records(root, folder, folder.name, split)


def file_records(root: Path, folder: Path, label: str | None, split: str | None) -> list[Record]:
    """A row for each image under `folder`, named from `root` on."""
    inside = folder.relative_to(root).parts
    before = len(os.path.join(str(folder), "")) - sum(len(part) + 1 for part in inside)
    return [Record(Item(path[before:], label, split), {IMAGE: Member(path)}) for path in _image_paths(str(folder))]


def images_under(folder: Path) -> Iterator[Path]:
    """Images in a folder and below, sorted, links followed; each folder is entered once, so a loop of links ends."""
    return map(Path, _image_paths(str(folder)))


def _image_paths(folder: str) -> Iterator[str]:
    """As `images_under`; text, because objects would take most of the time of listing a large set."""
    seen: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        current = stack.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        images, folders = _names(current)
        base = os.path.join(current, "")
        yield from [base + name for name in images]
        stack.extend(base + name for name in reversed(folders))


def _has_images(folder: Path) -> bool:
    """Whether there is an image in a folder or below; looks no further than the first one."""
    seen: set[tuple[int, int]] = set()
    stack = [str(folder)]
    while stack:
        current = stack.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for name, is_folder in _visible(current):
            if not is_folder:
                return True
            stack.append(os.path.join(current, name))
    return False


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and visible folders directly inside, sorted by name. Raises InputError where it may not be listed."""
    images, folders = _names(str(folder))
    return [folder / name for name in images], [folder / name for name in folders]


def _names(folder: str) -> tuple[list[str], list[str]]:
    images: list[str] = []
    folders: list[str] = []
    for name, is_folder in _visible(folder):
        (folders if is_folder else images).append(name)
    images.sort()
    folders.sort()
    return images, folders


def _visible(folder: str) -> Iterator[tuple[str, bool]]:
    """Names of images and folders directly inside, in no order, with whether each is a folder. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name == "__MACOSX":
                    continue
                if entry.is_dir():
                    yield name, True
                elif name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                    yield name, False
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be listed ({error.strerror or error})") from error


def read_csv_rows(path: Path) -> dict[int, dict[str, str]]:
    """Rows of a CSV with a header by the number of the line each ends on; spaces around names and values do not count.

    Raises InputError with the line of what is wrong.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
            if not columns:
                raise InputError(f"{path}: it is empty; wanted a header such as path,label,split and a row an image")
            if len(set(columns)) < len(columns):
                raise InputError(f"{path}: a column is named twice in {','.join(columns)}")
            rows = {}
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path}, line {reader.line_num}: wanted {len(columns)} values as in the header")
                rows[reader.line_num] = {name: value.strip() for name, value in row.items()}
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: {error}; is it a CSV file?") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not rows:
        raise InputError(f"{path}: it has a header but no rows")
    return rows


def scan_csv(path: Path) -> list[Record]:
    """Rows of a CSV with a column `path` and, where known, `label` and `split`; any other column travels along.

    Paths are relative to the CSV's folder and may not climb out of it; an absolute path is taken as written, since
    whoever wrote the list may read the file anyway. Backslashes separate folders, unless a file is named with them.
    Columns in FILE_COLUMNS name further files of the row.
    """
    rows = read_csv_rows(path)
    columns = next(iter(rows.values()))
    if "path" not in columns:
        raise InputError(
            f"{path}: no column `path` (it has {', '.join(columns)}); wanted path,label,split, "
            f"or {path.stem}.zip beside it"
        )
    records: list[Record] = []
    first_line: dict[str, int] = {}
    for line, row in rows.items():
        where = f"{path}, line {line}"
        members = {IMAGE: _listed_file(path.parent, row["path"], where)}
        members |= {kind: _listed_file(path.parent, row[kind], where) for kind in FILE_COLUMNS if row.get(kind)}
        name = posixpath.normpath(row["path"].replace("\\", "/"))
        if name in first_line:
            raise InputError(f"{where}: {name} stands in line {first_line[name]} already; list every image once")
        first_line[name] = line
        records.append(Record(Item(name, row.get("label") or None, split_name(row.get("split")), row), members))
    return records


def _listed_file(folder: Path, text: str, where: str) -> Member:
    if not text or "\0" in text:
        raise InputError(f"{where}: the path is {'empty' if not text else 'no file name'}")
    from_windows = "\\" in text and (os.name == "nt" or not _is_file(folder / text))
    written = PurePosixPath(text.replace("\\", "/") if from_windows else text)
    if ".." in written.parts or ".." in PureWindowsPath(text).parts:
        raise InputError(f"{where}: {text!r} climbs out of the folder of the list; write the full path instead")
    target = folder / written
    if not _is_file(target):
        raise InputError(f"{where}: {text!r:.200} is missing; paths are relative to {folder}")
    return Member(str(target))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False
