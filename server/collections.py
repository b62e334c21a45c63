"""Named sets of vectors: kept in a database, searched in memory.

The database is the truth: what `add` has returned survives a power cut. For search every collection has a Snapshot, an immutable copy
that follows the database by version, so that a search sees every write that was acknowledged before it, whichever server took it. A
collection belongs to the weights and the preprocessing that made its vectors, and no other network may use it. What an item is stands in
`collection_items`. All methods block; call them off the event loop.
"""

import asyncio
import json
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from evaluators.collection_file import CollectionFile
from server.collection_items import (
    CONTROLS,
    SAMPLES,
    Binding,
    CollectionInfo,
    Item,
    NewItem,
    check_label,
    check_writable,
    item_row,
    metadata_of,
    numbered,
)
from server.databases import Database, storage_errors
from server.errors import Conflict, NotFound
from server.neighbours import Snapshot, build_graph
from server.schema import collections, items, removals

log = logging.getLogger("server")
T = TypeVar("T")

MAX_VARIABLES = 10_000
"""Values in one statement; SQLite's limit is 32,766."""
ATTEMPTS = 5
"""How often a collection that others make and delete at the same moment is looked for."""
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class Collections:
    """All collections of one database, for one network."""

    def __init__(self, database: Database, binding: Binding) -> None:
        self.binding = binding
        self._database = database
        self._snapshots: dict[str, Snapshot] = {}
        self._writing, self._following = database.writing, threading.Lock()
        self._building: set[str] = set()

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    async def read(self, work: Callable[[], T]) -> T:
        """Do what asks the database, in threads kept for that."""
        return await asyncio.get_running_loop().run_in_executor(self._database.readers, work)

    def give_up(self) -> None:
        """Commit nothing any more; writes that are under way raise Draining, and are undone."""
        self._database.give_up()

    def bound_to(self, binding: Binding) -> "Collections":
        """The same database as a network of these weights sees it; close one of the two. For equal ones, with all that is in memory."""
        return self if binding == self.binding else Collections(self._database, binding)

    def leave_memory(self) -> None:
        """Forget what was read for searching; it is read again where it is asked for."""
        self._snapshots.clear()  # and no lock, which a database that stalls may keep

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
        check_writable(name)
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
        rows = numbered(new, lambda item: item_row(name, item, self.binding.dimension))
        with self._writing, self._begin() as db:
            version = self._opened(db, name, source, replace)
            if rows:
                self._check_new(db, name, [row["id"] for row in rows])
                db.execute(insert(items), [row | {"added": version} for row in rows])
        return [row["id"] for row in rows]

    def _locked(self, db: Connection, name: str) -> Any:
        """The collection's row, kept from other writers until the transaction ends; None where it is not there."""
        return db.execute(select(collections).where(collections.c.name == name).with_for_update()).one_or_none()

    def _there(self, db: Connection, name: str) -> Any:
        """The same. Raises NotFound where it is not there, Conflict where others make and delete it all the time."""
        for _ in range(ATTEMPTS):
            row = self._locked(db, name)
            if row is not None:
                return row
            self._collection(db, name)
        raise Conflict(f"collection {name!r} is being made and deleted by other servers just now; try again")

    def _opened(self, db: Connection, name: str, source: str, replace: bool) -> int:
        """The number of a write to the collection, which is made, or made anew, where that has to be. Raises Conflict."""
        for _ in range(ATTEMPTS):
            row = self._locked(db, name)
            if row is not None and not replace:
                self._check_usable(row)
                return _raise_version(db, row)
            if row is not None:
                _delete_rows(db, name)
            if self._make(db, name, source):
                return 1
        raise Conflict(f"collection {name!r} is being made by other servers just now; try again")

    def _make(self, db: Connection, name: str, source: str) -> bool:
        """Whether it was made; if not, another server has made it since it was looked for."""
        made = {"source": source, "created": _now(), "incarnation": uuid.uuid4().hex, "version": 1}
        new = _INSERT[db.dialect.name](collections).values(name=name, **made, **vars(self.binding))
        db.execute(new.on_conflict_do_nothing())
        row = self._locked(db, name)
        return row is not None and row.incarnation == made["incarnation"]

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

    def delete_item(self, name: str, item_id: str) -> None:
        """Take one item out. Raises NotFound."""
        check_writable(name)
        _check_findable(name, item_id)
        with self._writing, self._begin() as db:
            row = self._there(db, name)
            here = (items.c.collection == name) & (items.c.id == item_id)
            if db.execute(delete(items).where(here)).rowcount == 0:
                raise NotFound(f"collection {name!r} has no item {item_id!r:.80}")
            db.execute(insert(removals).values(collection=name, id=item_id, version=_raise_version(db, row)))

    def delete(self, name: str) -> None:
        """Take a whole collection away, whichever network made it. Raises NotFound."""
        check_writable(name)
        with self._writing, self._begin() as db:
            self._there(db, name)
            _delete_rows(db, name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        with self._following:
            self._snapshots.pop(name, None)

    def page(self, name: str, after: int, limit: int, label: str | None) -> list[Item]:
        """Items in the order of adding, those with a sequence number above `after` first."""
        thumbnail = items.c.thumbnail.is_not(None).label("has_thumbnail")
        query = select(items.c.id, items.c.label, items.c.metadata, thumbnail, items.c.sequence)
        query = query.where(items.c.collection == name, items.c.sequence > after).order_by(items.c.sequence)
        if label is not None:
            query = query.where(items.c.label == check_label(label))
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
        _check_findable(name, item_id)
        query = select(items.c.thumbnail).where(items.c.collection == name, items.c.id == item_id)
        with self._connect() as db:
            self._collection(db, name)
            row = db.execute(query).one_or_none()
        if row is None or row[0] is None:
            raise NotFound(f"collection {name!r} has no {'item' if row is None else 'picture of item'} {item_id!r:.80}")
        return bytes(row[0])

    def exported(self, name: str) -> CollectionFile:
        """The whole collection as a table. Raises NotFound."""
        columns = (items.c.id, items.c.label, items.c.metadata, items.c.vector, items.c.thumbnail)
        query = select(*columns).where(items.c.collection == name).order_by(items.c.sequence)
        with self._connect() as db:
            row = self._collection(db, name)
            rows = db.execute(query).all()
        vectors = np.frombuffer(b"".join(one.vector for one in rows), "<f4").reshape(len(rows), row.dimension)
        return CollectionFile(
            row.weights_sha256,
            row.preprocess,
            [one.id for one in rows],
            [one.label for one in rows],
            [json.dumps(one.metadata, ensure_ascii=False) for one in rows],
            vectors.astype(np.float32, copy=False),
            [None if one.thumbnail is None else bytes(one.thumbnail) for one in rows],
        )

    def imported(self, name: str, table: CollectionFile) -> list[str]:
        """Add all items of a table; see `add`. Raises Conflict for vectors of another network."""
        if (table.weights_sha256, table.preprocess) != (self.binding.weights_sha256, self.binding.preprocess):
            raise Conflict(
                f"the file's vectors were made with weights {table.weights_sha256[:12]}, and the served weights are "
                f"{self.binding.weights_sha256[:12]}, or the images were preprocessed otherwise: they cannot be compared"
            )
        metadata = numbered(table.metadata, metadata_of)
        rows = zip(table.ids, table.labels, metadata, table.vectors_nD, table.thumbnails, strict=True)
        new = [
            NewItem(id=item_id, label=label, metadata=about, vector=vector, thumbnail=picture)
            for item_id, label, about, vector, picture in rows
        ]
        return self.add(name, new)

    def snapshot(self, name: str) -> Snapshot:
        """The collection as it is now, for searching. Raises NotFound, or Conflict when another network made it.

        The samples stay what they were for a network that has them in memory: another one, which takes its place or is served beside it
        from the same database, makes them anew.
        """
        try:
            return self._present(name)
        except Conflict:
            kept = self._snapshots.get(name) if name == SAMPLES else None
            if kept is None:
                raise
            return kept

    def _present(self, name: str) -> Snapshot:
        try:
            with self._connect() as db:
                row = self._collection(db, name)
                self._check_usable(row)
        except NotFound:  # it may be another server that has deleted it
            self._forget(name)
            raise
        found = self._snapshots.get(name)
        if found is None or (found.incarnation, found.version) != (row.incarnation, row.version):
            with self._following:
                found = self._follow(name)
        if found.wants_graph:
            self._build_graph(found)
        return found

    def _follow(self, name: str) -> Snapshot:
        """Bring this process's copy up to the database."""
        with self._connect() as db:
            row = self._collection(db, name)
            self._check_usable(row)
            old = self._snapshots.get(name)
            if old is None or old.incarnation != row.incarnation:
                old = Snapshot.empty(name, self.binding.dimension)
            if (old.incarnation, old.version) == (row.incarnation, row.version):
                return old
            mine = items.c.collection == name
            # What a later write added is left for later, or it would be added twice.
            query = select(items.c.id, items.c.label, items.c.vector).where(
                mine, items.c.added > old.version, items.c.added <= row.version
            )
            new = [dict(one) for one in db.execute(query.order_by(items.c.sequence)).mappings()]
            gone = select(removals.c.id).where(removals.c.collection == name, removals.c.version > old.version)
            removed = [] if old.version == 0 else list(db.execute(gone).scalars())
        self._snapshots[name] = old.changed(removed, new, row.incarnation, row.version)
        return self._snapshots[name]

    def _build_graph(self, snapshot: Snapshot) -> None:
        """Build a graph for a large collection beside everything else; searches are exact, and slower, until it is there."""
        with self._following:
            if snapshot.name in self._building:
                return
            self._building.add(snapshot.name)

        def build() -> None:
            try:
                graph = build_graph(snapshot)
                with self._following:
                    present = self._snapshots.get(snapshot.name)
                    if present is not None:
                        self._snapshots[snapshot.name] = present.with_graph(graph)
                log.info("graph built", extra={"fields": {"collection": snapshot.name, "items": graph.n}})
            except Exception:
                log.exception("graph failed", extra={"fields": {"collection": snapshot.name}})
            finally:
                self._building.discard(snapshot.name)

        threading.Thread(target=build, name=f"graph of {snapshot.name}", daemon=True).start()

    def _collection(self, db: Connection, name: str) -> Any:
        row = None
        if not CONTROLS.search(name):  # no text that PostgreSQL takes
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
        with storage_errors(), self._database.engine.connect() as db:
            yield db

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with storage_errors(), self._database.engine.begin() as db:
            yield db
            self._database.check_open()


def _check_findable(name: str, item_id: str) -> None:
    """Raise NotFound for what is no id of any item: a database need not even take it as a text."""
    if CONTROLS.search(item_id):
        raise NotFound(f"collection {name!r} has no item {item_id!r:.80}")


def _delete_rows(db: Connection, name: str) -> None:
    for table in (items, removals):
        db.execute(delete(table).where(table.c.collection == name))
    db.execute(delete(collections).where(collections.c.name == name))


def _raise_version(db: Connection, row: Any) -> int:
    """Number this write; the caller holds the collection's row."""
    version = int(row.version) + 1
    db.execute(update(collections).where(collections.c.name == row.name).values(version=version))
    return version


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
