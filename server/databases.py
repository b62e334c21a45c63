"""Where collections are kept: a SQLite file that one server has open, or a PostgreSQL database that several share."""

import fcntl
import importlib.util
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from data.errors import InputError
from server.errors import Draining, StorageFailed
from server.schema import metadata

POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")
CONNECT_S = 10
"""How long a database may take to answer a connection."""
LOCK_S = 20
"""How long a write waits for that of another server; SQLite's connections wait as long for each other."""
LINE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""libpq's words for: a database whose machine is gone is given up after a minute, not after hours."""
READERS = 4
"""Threads that ask a database: a store that stalls may keep these waiting, and nobody's images."""


class Database:
    """An open database with its tables. `shared` where other servers may write to it."""

    def __init__(self, engine: Engine, shared: bool, lock_file: int | None = None) -> None:
        self.engine, self.shared = engine, shared
        self.writing = threading.Lock()
        """Held by whoever writes: SQLite locks nothing for one who has only read what it is about to change."""
        self.readers = ThreadPoolExecutor(READERS, "reads")
        self._given_up = False
        self._lock_file = lock_file

    def give_up(self) -> None:
        """Commit nothing any more: whoever is not answered by now is told that it was not done."""
        self._given_up = True

    def check_open(self) -> None:
        """Raise Draining once it was given up."""
        if self._given_up:
            raise Draining("the server is shutting down")

    def close(self) -> None:
        """Let go of it."""
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.engine.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)


def open_database(folder: Path, url: str | None) -> Database:
    """The PostgreSQL database of a URL, or the SQLite file in a folder. Raises InputError where it cannot be used."""
    return open_sqlite(folder) if url is None else open_postgres(url)


def open_sqlite(folder: Path) -> Database:
    """The file of a folder, which no other server may have open; a write that returned survives a power cut (WAL, synchronous FULL)."""
    lock_file = _lock_folder(folder)
    engine = create_engine(f"sqlite:///{folder / 'collections.sqlite'}", connect_args={"timeout": LOCK_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    try:
        _make_tables(engine)
    except StorageFailed as error:
        os.close(lock_file)
        raise InputError(f"--collections {folder}: {error}; move the file away, or name another folder") from error
    return Database(engine, shared=False, lock_file=lock_file)


def open_postgres(text: str) -> Database:
    """The database of a URL `postgresql://user:password@host:port/name`, its tables made where they are missing."""
    url = _postgres_url(text)
    if importlib.util.find_spec("psycopg") is None:
        raise InputError(
            "--database: psycopg is not installed; run: .venv/bin/pip install -c constraints.txt -e '.[postgres]'"
        )
    connecting = {"connect_timeout": CONNECT_S} | {name: n for name, n in LINE.items() if name not in url.query}
    engine = create_engine(url, pool_pre_ping=True, connect_args=connecting)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.execute(f"SET lock_timeout = '{LOCK_S}s'")
        connection.commit()

    try:
        _make_tables(engine)
    except StorageFailed as error:
        engine.dispose()
        raise InputError(f"--database {url.render_as_string(hide_password=True)}: {error}") from error
    return Database(engine, shared=True)


def _postgres_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError("--database: is no URL; wanted postgresql://user:password@host:port/name") from error
    if url.drivername not in POSTGRES or not url.database:
        raise InputError(
            f"--database {url.render_as_string(hide_password=True)}: wanted postgresql://user:password@host:port/name"
        )
    return url.set(drivername="postgresql+psycopg")


def _make_tables(engine: Engine) -> None:
    """Make what is missing. Raises StorageFailed, also for tables of another version of this program."""
    with storage_errors():
        try:
            metadata.create_all(engine)
        except SQLAlchemyError:
            metadata.create_all(engine)  # two servers that start at once make the same tables; the second finds them
        found = inspect(engine)
        for table in metadata.sorted_tables:
            missing = {column.name for column in table.columns} - {one["name"] for one in found.get_columns(table.name)}
            if missing:
                raise StorageFailed(f"its table {table.name!r} is of another version: no column {min(missing)!r}")


@contextmanager
def storage_errors() -> Iterator[None]:
    """Whatever a database says, as StorageFailed in one line."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageFailed(f"the collections cannot be read or written: {getattr(error, 'orig', error)}") from error


def _lock_folder(folder: Path) -> int:
    """Keep the folder for this process: two servers on one SQLite file would wait for each other's writes."""
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
        raise InputError(
            f"--collections {folder}: another server has it open; name another folder, or share a --database"
        ) from error
    return handle
