"""The collection `samples`: a data set embedded by the served network when the server starts for the first time."""

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.datasets import Dataset, open_dataset
from data.errors import InputError
from server.collection_items import CONTROLS, MAX_ID, SAMPLES, NewItem
from server.collections import Collections
from server.engine import Engine
from server.errors import Conflict
from server.pictures import thumbnail
from server.statistics import Times

log = logging.getLogger("server")

CHUNK = 32
"""Images that are embedded at a time."""
SHOWN_COLUMNS = ("title", "author", "licence", "license", "source")
"""Columns of a CSV that become an item's metadata: what a reader must be told about an image."""


async def build_samples(engine: Engine, store: Collections, data: str) -> int:
    """Make the collection unless it is there already, of these images and this network. Returns its size.

    Images that cannot be decoded are left out and logged; when none can, raises InputError.
    """
    dataset = await engine.off_loop(open_dataset, data)
    fingerprint = await engine.off_loop(dataset.fingerprint)
    if await engine.off_loop(store.source, SAMPLES) == fingerprint:
        return len(await engine.off_loop(store.snapshot, SAMPLES))
    log.info("building samples", extra={"fields": {"data": data, "images": len(dataset.items)}})
    new: list[NewItem] = []
    ids = item_ids([item.name for item in dataset.items])
    for start in range(0, len(dataset.items), CHUNK):
        rows = range(start, min(start + CHUNK, len(dataset.items)))
        new += await _embed(engine, dataset, rows, ids)
    if not new:
        raise InputError(f"--samples {data}: none of its {len(dataset.items)} images can be used")
    await engine.off_loop(store.replace, SAMPLES, new, fingerprint)
    with suppress(Conflict):  # of a server of another network, which has made them anew by now
        await engine.off_loop(store.snapshot, SAMPLES)  # and from now on they are in memory, whoever makes them anew
    return len(new)


async def _embed(engine: Engine, dataset: Dataset, rows: range, ids: Sequence[str]) -> list[NewItem]:
    kept: list[int] = []
    images: list[bytes] = []
    pictures: list[bytes] = []
    for row in rows:
        try:
            pictures.append(await engine.off_loop(lambda row: thumbnail(dataset.image(row)), row))
        except InputError as error:
            log.warning("sample left out", extra={"fields": {"name": dataset.items[row].name, "error": str(error)}})
            continue
        images.append(await engine.off_loop(dataset.read, row))
        kept.append(row)
    if not kept:
        return []
    pixels = await engine.center_views(images, Times())
    embedding_ND = (await engine.run(pixels, ["embedding"], Times()))["embedding"]
    return [_item(dataset, row, ids[row], embedding_ND[number], pictures[number]) for number, row in enumerate(kept)]


def _item(dataset: Dataset, row: int, item_id: str, vector, picture: bytes) -> NewItem:  # type: ignore[no-untyped-def]
    item = dataset.items[row]
    metadata = {"file": item.name} | {name: item.row[name] for name in SHOWN_COLUMNS if item.row.get(name)}
    metadata = {name: storable(text) for name, text in metadata.items()}
    label = None if item.label is None else storable(item.label)
    return NewItem(vector=vector, id=item_id, label=label, metadata=metadata, thumbnail=picture)


def item_ids(names: Sequence[str]) -> list[str]:
    """An id for each image, from its name: without its ending unless another has the same then, and without folders' slashes."""
    short = [storable(str(Path(name).with_suffix(""))).replace("/", ":") for name in names]
    count, taken, ids = Counter(short), set[str](), []
    for name, one in zip(names, short, strict=True):
        wanted = one if count[one] == 1 and one not in (".", "..") else storable(name).replace("/", ":")
        wanted = wanted if len(wanted) <= MAX_ID else f"...{wanted[3 - MAX_ID :]}"
        item_id, number = wanted, 1
        while item_id in taken:  # as a:b.png and a/b.png, or a row that comes twice
            number += 1
            item_id = f"{wanted[: MAX_ID - 8]}#{number}"
        taken.add(item_id)
        ids.append(item_id)
    return ids


def storable(text: str) -> str:
    """Text of a file's name or a table as every database and JSON can hold it: bytes that are no UTF-8, and control characters, escaped."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", whole)
