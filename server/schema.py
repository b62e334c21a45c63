"""The tables of the collections store, in types that SQLite and PostgreSQL share.

Every write to a collection raises its `version` by one, under a lock on its row; an item carries the version that added it, a removal the
version that took the item out. So whoever holds a collection as of version v in memory asks for what came after v, however many servers
write. A collection that is dropped and made again has another `incarnation`.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData()
_NUMBER = BigInteger().with_variant(Integer, "sqlite")

collections = Table(
    "collections",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("weights_sha256", String(64), nullable=False),
    Column("preprocess", String, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("source", String, nullable=False),
    Column("created", String(32), nullable=False),
    Column("incarnation", String(32), nullable=False),
    Column("version", BigInteger, nullable=False),
)
"""One row a collection; `source` is the fingerprint of the data set it was built from, empty where clients filled it."""

items = Table(
    "items",
    metadata,
    Column("sequence", _NUMBER, primary_key=True, autoincrement=True),
    Column("collection", String(64), ForeignKey("collections.name"), nullable=False),
    Column("id", String(256), nullable=False),
    Column("label", String),
    Column("metadata", JSON, nullable=False),
    Column("vector", LargeBinary, nullable=False),
    Column("thumbnail", LargeBinary),
    Column("added", BigInteger, nullable=False),
    UniqueConstraint("collection", "id"),
    Index("items_by_version", "collection", "added"),
    sqlite_autoincrement=True,
)
"""One row an item; `vector` is float32, little-endian, as the network gave it."""

removals = Table(
    "removals",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("collection", String(64), ForeignKey("collections.name"), nullable=False),
    Column("id", String(256), nullable=False),
    Column("version", BigInteger, nullable=False),
    Index("removals_by_version", "collection", "version"),
)
"""One row an item taken out, for those who still have it in memory."""
