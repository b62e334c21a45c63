"""Named sets of vectors: kept in SQLite, searched in memory.

The database is the truth: what `add` has returned survives a power cut (write-ahead log, synchronous FULL). For search
every collection has a Snapshot, an immutable copy that is replaced as a whole after each write, so searches and writes
run side by side. A collection belongs to the weights and the preprocessing that made its vectors, and no other network may
use it. Read in this order: Binding, NewItem, Collections. All methods block; call them off the event loop.
"""

import fcntl
import os
import re
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, create_engine, delete, event, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from data.errors import InputError
from server.errors import Conflict, NotFound, StorageFailed
from server.neighbours import Snapshot
from server.schema import collections, items, metadata

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
ID = re.compile(r"[^\x00-\x1f\x7f/]{1,256}")
MAX_VARIABLES = 10_000
"""Values in one statement; SQLite's limit is 32,766."""
SAMPLES = "samples"
"""The collection that the server builds itself; clients cannot write to it."""


@dataclass(frozen=True)
class Binding:
    """What a vector depends on besides its image."""

    weights_sha256: str
    preprocess: str
    """The preprocessing as JSON with sorted keys."""
    dimension: int


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """An item to add."""

    vector: np.ndarray
    """float32 [D], as the network gives it, not normalised."""
    id: str | None = None
    """None: one is made up."""
    label: str | None = None
    metadata: dict[str, Any] | None = None
    thumbnail: bytes | None = None
    """A small JPEG."""


@dataclass(frozen=True)
class Item:
    """An item as it is listed."""

    id: str
    label: str | None
    metadata: dict[str, Any]
    has_thumbnail: bool
    sequence: int
    """Grows with every item added; pages follow it."""


@dataclass(frozen=True)
class CollectionInfo:
    """A collection as it is listed."""

    name: str
    size: int
    dimension: int
    created: str
    usable: bool
    """False where it was made with another network than the one served."""
    read_only: bool


class Collections:
    """All collections of one folder. One server at a time may have it open."""

    def __init__(self, folder: Path, binding: Binding) -> None:
        self.binding = binding
        self._lock_file = _lock_folder(folder)
        try:
            self._db = _open_sqlite(folder / "collections.sqlite")
        except StorageFailed as error:
            os.close(self._lock_file)
            raise InputError(f"--collections {folder}: {error}; move the file away, or name another folder") from error
        self._snapshots: dict[str, Snapshot] = {}
        self._writing = threading.Lock()

    def close(self) -> None:
        """Let go of the folder."""
        self._db.dispose()
        os.close(self._lock_file)

    def infos(self) -> list[CollectionInfo]:
        """Every collection, by name."""
        size = select(func.count()).where(items.c.collection == collections.c.name).scalar_subquery()
        with self._connect() as db:
            rows = db.execute(select(collections, size.label("size")).order_by(collections.c.name)).all()
        return [
            CollectionInfo(
                row.name, row.size, row.dimension, row.created, self._mismatch(row) is None, row.name == SAMPLES
            )
            for row in rows
        ]

    def add(self, name: str, new: Sequence[NewItem]) -> list[str]:
        """Add items, making the collection if it is not there; all are added, or none. Returns their ids.

        They are on disk when this returns. Raises Conflict for an id that is taken or a collection of another network.
        """
        _check_writable(name)
        return self._add(name, new)

    def replace(self, name: str, new: Sequence[NewItem], source: str) -> None:
        """Put a new collection in the place of the old one, in one step; `source` says what it was made from."""
        self._add(name, new, source, replace=True)

    def source(self, name: str) -> str | None:
        """What `replace` was told when it made this collection for this network; None where it has to be made."""
        with self._connect() as db:
            row = db.execute(select(collections).where(collections.c.name == name)).one_or_none()
        return row.source if row is not None and self._mismatch(row) is None else None

    def _add(self, name: str, new: Sequence[NewItem], source: str = "", replace: bool = False) -> list[str]:
        rows = [self._row(name, item) for item in new]
        with self._writing:
            with self._begin() as db:
                if replace:
                    _delete_rows(db, name)
                row = db.execute(select(collections).where(collections.c.name == name)).one_or_none()
                if row is None:
                    db.execute(
                        insert(collections).values(name=name, source=source, created=_now(), **vars(self.binding))
                    )
                else:
                    self._check_usable(row)
                if rows:
                    self._check_new(db, name, [row["id"] for row in rows])
                    db.execute(insert(items), rows)
            if replace:
                self._snapshots.pop(name, None)
            elif name in self._snapshots:
                self._snapshots[name] = self._snapshots[name].extended(rows)
        return [row["id"] for row in rows]

    def _check_new(self, db: Connection, name: str, ids: Sequence[str]) -> None:
        """Raise Conflict for an id that comes twice or is taken. Asked before anything is written: afterwards all are there."""
        twice = next((one for one, n in Counter(ids).items() if n > 1), None)
        if twice is not None:
            raise Conflict(f"collection {name!r}: id {twice!r:.80} comes twice in this request")
        for start in range(0, len(ids), MAX_VARIABLES):
            same = items.c.id.in_(ids[start : start + MAX_VARIABLES])
            taken = db.execute(select(items.c.id).where(items.c.collection == name, same)).scalar()
            if taken is not None:
                raise Conflict(f"collection {name!r}: id {taken!r:.80} is taken; delete it first")

    def _row(self, name: str, item: NewItem) -> dict[str, Any]:
        vector = np.ascontiguousarray(item.vector, "<f4")
        if vector.shape != (self.binding.dimension,):
            raise InputError(f"an embedding has {vector.size} numbers; this network's have {self.binding.dimension}")
        with np.errstate(over="ignore"):
            length = np.linalg.norm(vector)
        if not 0 < length < np.inf:
            raise InputError("an embedding is zero or not finite, so it has no direction to compare")
        if item.id is not None and (not ID.fullmatch(item.id) or item.id in (".", "..")):
            raise InputError(
                f"id {item.id!r:.80}: wanted 1 to 256 characters, no control characters, no '/', and not '.' or '..'"
            )
        return {
            "collection": name,
            "id": item.id if item.id is not None else uuid.uuid4().hex,
            "label": item.label,
            "metadata": item.metadata or {},
            "vector": vector.tobytes(),
            "thumbnail": item.thumbnail,
        }

    def delete_item(self, name: str, item_id: str) -> None:
        """Take one item out. Raises NotFound."""
        _check_writable(name)
        with self._writing:
            with self._begin() as db:
                self._collection(db, name)
                here = (items.c.collection == name) & (items.c.id == item_id)
                if db.execute(delete(items).where(here)).rowcount == 0:
                    raise NotFound(f"collection {name!r} has no item {item_id!r:.80}")
            if name in self._snapshots:
                self._snapshots[name] = self._snapshots[name].without(item_id)

    def delete(self, name: str) -> None:
        """Take a whole collection away, whichever network made it. Raises NotFound."""
        _check_writable(name)
        with self._writing:
            with self._begin() as db:
                self._collection(db, name)
                _delete_rows(db, name)
            self._snapshots.pop(name, None)

    def page(self, name: str, after: int, limit: int, label: str | None) -> list[Item]:
        """Items in the order of adding, those with a sequence number above `after` first."""
        thumbnail = items.c.thumbnail.is_not(None).label("has_thumbnail")
        query = select(items.c.id, items.c.label, items.c.metadata, thumbnail, items.c.sequence)
        query = query.where(items.c.collection == name, items.c.sequence > after).order_by(items.c.sequence)
        if label is not None:
            query = query.where(items.c.label == label)
        with self._connect() as db:
            self._collection(db, name)
            rows = db.execute(query.limit(limit)).all()
        return [Item(row[0], row[1], row[2], bool(row[3]), row[4]) for row in rows]

    def details(self, name: str, ids: Sequence[str]) -> dict[str, Item]:
        """The items of these ids; one deleted in the meantime is missing."""
        thumbnail = items.c.thumbnail.is_not(None).label("has_thumbnail")
        query = select(items.c.id, items.c.label, items.c.metadata, thumbnail, items.c.sequence)
        rows: list[Any] = []
        with self._connect() as db:
            for start in range(0, len(ids), MAX_VARIABLES):
                some = items.c.id.in_(ids[start : start + MAX_VARIABLES])
                rows += db.execute(query.where(items.c.collection == name, some)).all()
        return {row[0]: Item(row[0], row[1], row[2], bool(row[3]), row[4]) for row in rows}

    def thumbnail(self, name: str, item_id: str) -> bytes:
        """The item's small JPEG. Raises NotFound."""
        query = select(items.c.thumbnail).where(items.c.collection == name, items.c.id == item_id)
        with self._connect() as db:
            self._collection(db, name)
            row = db.execute(query).one_or_none()
        if row is None or row[0] is None:
            raise NotFound(f"collection {name!r} has no {'item' if row is None else 'picture of item'} {item_id!r:.80}")
        return bytes(row[0])

    def snapshot(self, name: str) -> Snapshot:
        """The collection as it is now, for searching. Raises NotFound, or Conflict when another network made it."""
        found = self._snapshots.get(name)
        if found is not None:
            return found
        with self._writing:
            if name not in self._snapshots:
                self._snapshots[name] = self._load(name)
            return self._snapshots[name]

    def _load(self, name: str) -> Snapshot:
        query = select(items.c.id, items.c.label, items.c.vector).where(items.c.collection == name)
        with self._connect() as db:
            self._check_usable(self._collection(db, name))
            rows = db.execute(query.order_by(items.c.sequence)).all()
        empty = Snapshot(name, (), (), np.zeros((0, self.binding.dimension), np.float32))
        return empty.extended([{"id": row.id, "label": row.label, "vector": row.vector} for row in rows])

    def _collection(self, db: Connection, name: str) -> Any:
        row = db.execute(select(collections).where(collections.c.name == name)).one_or_none()
        if row is None:
            names = db.execute(select(collections.c.name).order_by(collections.c.name).limit(20)).scalars().all()
            raise NotFound(f"there is no collection {name!r:.80}; there are: {', '.join(names) or 'none'}")
        return row

    def _mismatch(self, row: Any) -> str | None:
        if row.weights_sha256 != self.binding.weights_sha256:
            return f"weights {row.weights_sha256[:12]}, and the served weights are {self.binding.weights_sha256[:12]}"
        if (row.preprocess, row.dimension) != (self.binding.preprocess, self.binding.dimension):
            return "another preprocessing of the images"
        return None

    def _check_usable(self, row: Any) -> None:
        mismatch = self._mismatch(row)
        if mismatch:
            raise Conflict(
                f"collection {row.name!r} was made with {mismatch}: its vectors cannot be compared; "
                "serve that network, or delete the collection and add its images again"
            )

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        with _storage_errors(), self._db.connect() as db:
            yield db

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with _storage_errors(), self._db.begin() as db:
            yield db


def _delete_rows(db: Connection, name: str) -> None:
    db.execute(delete(items).where(items.c.collection == name))
    db.execute(delete(collections).where(collections.c.name == name))


def check_name(name: str) -> str:
    """The name, if it may be one. Raises InputError."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"collection name {name!r:.80}: wanted 1 to 64 of a-z, 0-9, '-' and '_', a letter or digit first"
        )
    return name


def _check_writable(name: str) -> None:
    if check_name(name) == SAMPLES:
        raise Conflict(f"collection {SAMPLES!r} is built by the server from its sample images; use a name of your own")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lock_folder(folder: Path) -> int:
    """Keep the folder for this process: a second server would not see this one's writes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(
            f"--collections {folder}: cannot write there ({error.strerror}); name another folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise InputError(f"--collections {folder}: another server has it open; name another folder") from error
    return handle


def _open_sqlite(path: Path) -> Engine:
    db = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @event.listens_for(db, "connect")
    def configure(connection: Any, _: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    with _storage_errors():
        metadata.create_all(db)
    return db


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageFailed(f"the collections cannot be read or written: {getattr(error, 'orig', error)}") from error
