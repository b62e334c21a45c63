"""Sets that keep many images in one file: tar shards (WebDataset), and a zip archive with its manifest beside it.

WebDataset: entries that share a name up to the first dot of its last part are one sample: `000.jpg`, `000.cls`
(or `.txt`, or `.json` with `label` and `split`), `000.depth_mm.png` (a further file, of kind `depth_mm`).

A packed set is NAME.csv (a row an image) and NAME.zip with a folder a kind: `images/`, `masks/`, `depth_mm/`...
Rows and entries meet in the column `name`; a row of a video names its folder in the column `clip`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from data.errors import InputError
from data.listings import IMAGE, IMAGE_SUFFIXES, Item, Record, is_image_name, read_csv_rows, split_name
from data.members import Member, list_tar, list_zip, read_bytes

_MAX_LABEL_BYTES = 2**20
_LABEL_PARTS = ("cls", "json", "txt")


def scan_shards(shards: Iterable[Path]) -> list[Record]:
    """Rows of tar shards in WebDataset form. Raises InputError for a damaged shard, a name twice, a label alone."""
    shards = sorted(shards)
    stems = [shard.stem for shard in shards]
    records: list[Record] = []
    for shard in shards:
        # shards of one name in different folders (train/000.tar, val/000.tar) stay apart
        prefix = shard.stem if stems.count(shard.stem) == 1 else f"{shard.parent.name}/{shard.stem}"
        samples: dict[str, dict[str, Member]] = {}
        for name, member in list_tar(shard):
            if PurePosixPath(name).name.startswith("."):
                continue
            key, dot, part = _split_key(name)
            if not dot:  # a README, an index: no part of a sample
                continue
            parts = samples.setdefault(key, {})
            if part.lower() in parts:
                raise InputError(f"{shard}: it holds {name} twice; pack it again")
            parts[part.lower()] = member
        records += [_sample_record(shard, prefix, key, parts) for key, parts in samples.items()]
    if not records:
        raise InputError(
            f"{shards[0]}: no images in {len(shards)} tar file(s); wanted entries such as 000.jpg, 000.cls"
        )
    return records


def _split_key(name: str) -> tuple[str, str, str]:
    folder, slash, last = name.rpartition("/")
    stem, dot, part = last.partition(".")
    return f"{folder}{slash}{stem}".removeprefix("./"), dot, part


def _sample_record(shard: Path, prefix: str, key: str, parts: dict[str, Member]) -> Record:
    members: dict[str, Member] = {}
    for part, member in parts.items():
        kind, dot, suffix = part.rpartition(".")
        if f".{suffix}" not in IMAGE_SUFFIXES:
            continue
        kind = kind if dot else IMAGE
        if kind in members:
            raise InputError(f"{shard}: sample {key} has two files of kind {kind}; one was wanted")
        members[kind] = member
    if IMAGE not in members:
        raise InputError(f"{shard}: sample {key} has {', '.join(sorted(parts))} but no image")
    row = _sample_row(shard, key, parts)
    label = row.get("cls") or row.get("label") or row.get("txt")
    split = split_name(row.get("split")) or split_of_shard(shard)
    return Record(Item(f"{prefix}/{key}", label or None, split, row), members)


def _sample_row(shard: Path, key: str, parts: dict[str, Member]) -> dict[str, str]:
    row: dict[str, str] = {}
    for part in _LABEL_PARTS:
        if part not in parts:
            continue
        if (parts[part].size or 0) > _MAX_LABEL_BYTES:
            raise InputError(f"{shard}: {key}.{part} has {parts[part].size:,} bytes; a label was wanted")
        try:
            text = read_bytes(parts[part]).decode("utf-8").strip()
            values: Any = json.loads(text) if part == "json" else {part: text}
        except (ValueError, RecursionError) as error:
            raise InputError(f"{shard}: {key}.{part} is not what it is named after ({error})") from error
        if isinstance(values, dict):
            row |= {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return row


def split_of_shard(shard: Path) -> str | None:
    """`train-000.tar` and `train/000.tar` hold the split `train`."""
    for word in (shard.stem.replace("_", "-").split("-")[0], shard.parent.name):
        if split_name(word.lower()) in ("train", "val", "test"):
            return split_name(word.lower())
    return None


def scan_packed(manifest: Path, archive: Path) -> list[Record]:
    """Rows of a packed set. Raises InputError for a row whose image is not in the archive."""
    rows = list(read_csv_rows(manifest).values())
    files: dict[tuple[str, str], Member] = {}
    for name, member in list_zip(archive).items():
        folder, _, rest = name.partition("/")
        if is_image_name(PurePosixPath(rest).name):
            files[folder, rest.rsplit(".", 1)[0]] = member
    folders = sorted({folder for folder, _ in files})
    if "name" in rows[0]:
        records = [_packed_record(archive, row, folders, files) for row in rows]
    elif "clip" in rows[0]:
        records = [record for row in rows for record in _clip_records(archive, row, folders, files)]
    else:
        raise InputError(f"{manifest}: no column `name` or `clip` (it has {', '.join(rows[0])})")
    names = [record.item.name for record in records]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{manifest}: {twice} stands in two rows; list every image once")
    return records


def _packed_record(
    archive: Path, row: dict[str, str], folders: list[str], files: dict[tuple[str, str], Member]
) -> Record:
    if row.get("vendor") in folders:  # one folder a vendor, the same name in each
        image_folder, name = row["vendor"], f"{row['vendor']}/{row['name']}"
    else:
        image_folder, name = ("images" if "images" in folders else "scene"), row["name"]
    members = {}
    for folder in folders:
        key = row["plain"] if folder.startswith("plain") and "plain" in row else row["name"]
        if (folder, key) in files and (folder == image_folder or "vendor" not in row):
            members[IMAGE if folder == image_folder else folder] = files[folder, key]
    if IMAGE not in members:
        raise InputError(f"{archive}: no {image_folder}/{row['name']}.*, which the manifest lists")
    if f"{image_folder}_mask" in members:  # masks go by one name in all sets
        members["masks"] = members[f"{image_folder}_mask"]
    return Record(Item(name, row.get("label") or None, _packed_split(row), row), members)


def _clip_records(
    archive: Path, row: dict[str, str], folders: list[str], files: dict[tuple[str, str], Member]
) -> list[Record]:
    clip = row["clip"]
    frames = sorted(key for folder, key in files if folder == "images" and key.startswith(f"{clip}/"))
    if not frames:
        raise InputError(f"{archive}: no images/{clip}/*, which the manifest lists")
    records = []
    for key in frames:
        members = {
            IMAGE if folder == "images" else folder: files[folder, key] for folder in folders if (folder, key) in files
        }
        frame_row = {**row, "frame": key.removeprefix(f"{clip}/")}
        records.append(Record(Item(key, None, _packed_split(row), frame_row), members))
    return records


def _packed_split(row: dict[str, str]) -> str | None:
    """The row's split; where the manifest names none, by its columns.

    Views of a 3D model (`instance`) are split by model: one model in four, by a hash of its name, is held out. Clips
    and groups of near-duplicates are there to be evaluated on. Anything else (a pool) has no splits.
    """
    if "split" in row:
        return split_name(row["split"])
    if "instance" in row:
        digest = hashlib.sha1(f"ov{row['instance']}".encode(), usedforsecurity=False).hexdigest()
        return "val" if int(digest[:8], 16) % 4 == 0 else "train"
    return "val" if "clip" in row or "group" in row else None
