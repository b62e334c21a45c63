"""Kept images in, something that training reads out: a CSV of paths, or tar shards with the bytes themselves."""

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import cv2

from curation.filters import FindBoxes, blur_boxes
from curation.folder import Folder, replacing
from curation.workers import HereWorkers
from data.datasets import Dataset
from data.errors import InputError
from data.listings import IMAGE_SUFFIXES

SHARD_IMAGES = 2000
"""Images of a shard."""


def can_be_listed(dataset: Dataset, rows: Sequence[int]) -> bool:
    """Whether every image is a file of its own with a path that a UTF-8 list can name."""
    for row in rows:
        path = dataset.file_of(row)
        if path is None:
            return False
        try:
            str(path).encode()
        except UnicodeEncodeError:
            return False
    return True


def save_list(out: Path, dataset: Dataset, rows: Sequence[int]) -> Path:
    """Write OUT/kept.csv with columns path,label,split; paths are absolute. Raises InputError for an image inside an archive."""
    target = out / "kept.csv"
    with replacing(target) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for row in rows:
            path, item = dataset.file_of(row), dataset.items[row]
            if path is None:
                raise InputError(f"--form csv: {item.name} lies in an archive, not in a file; use --form shards")
            writer.writerow((os.path.abspath(path), item.label or "", item.split or ""))
    return target


def save_shards(
    folder: Folder,
    dataset: Dataset,
    rows: Sequence[int],
    fingerprint: str,
    find_boxes: FindBoxes | None,
    hook: str | None,
) -> Path:
    """Write OUT/shards/kept-NNNNNN.tar in WebDataset form: each image's bytes, and name, label and split beside it."""
    stage = folder.stage("shards", data=fingerprint, rows=list(rows), blur=hook)
    target, made_from = folder.path / "shards", folder.path / "shards" / ".made-from"
    # Other settings may have written there since this stage was done.
    if stage.done and made_from.is_file() and made_from.read_text() == stage.key:
        return target
    starts = range(0, len(rows), SHARD_IMAGES)
    tasks = [
        (rows[start : start + SHARD_IMAGES], stage.path / f"kept-{start // SHARD_IMAGES:06d}.tar") for start in starts
    ]
    HereWorkers().run("writing shards", save_shard, (dataset, find_boxes), tasks)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for _, path in tasks:
        os.replace(path, target / path.name)
    stage.finish()
    made_from.write_text(stage.key)
    return target


def save_shard(dataset: Dataset, find_boxes: FindBoxes | None, rows: Sequence[int], out: Path) -> None:
    """One shard, whole or not at all."""
    if out.is_file():
        return
    with replacing(out) as scratch, tarfile.open(scratch, "w") as archive:
        for row in rows:
            item = dataset.items[row]
            encoded, suffix = _encoded(dataset, row, find_boxes)
            about = {"name": item.name, "label": item.label, "split": item.split}
            stated = {name: value for name, value in about.items() if value is not None}
            _add(archive, f"{row:012d}{suffix}", encoded)
            _add(archive, f"{row:012d}.json", json.dumps(stated).encode())


def _encoded(dataset: Dataset, row: int, find_boxes: FindBoxes | None) -> tuple[bytes, str]:
    """The image's own bytes and suffix; a PNG where something in it was blurred."""
    encoded = dataset.read(row)
    if find_boxes is not None:
        image_HWC = dataset.image(row)
        boxes = find_boxes(image_HWC)
        if len(boxes):
            blurred = cv2.cvtColor(blur_boxes(image_HWC, boxes), cv2.COLOR_RGB2BGR)
            return cv2.imencode(".png", blurred)[1].tobytes(), ".png"
    return encoded, image_suffix(encoded, dataset.items[row].name)


def image_suffix(encoded: bytes, name: str) -> str:
    """The suffix of an image by its first bytes, else its name's own."""
    for magic, suffix in (
        (b"\xff\xd8", ".jpg"),
        (b"\x89PNG", ".png"),
        (b"BM", ".bmp"),
        (b"II", ".tiff"),
        (b"MM", ".tiff"),
    ):
        if encoded.startswith(magic):
            return suffix
    if encoded[8:12] == b"WEBP":
        return ".webp"
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in IMAGE_SUFFIXES else ".jpg"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
