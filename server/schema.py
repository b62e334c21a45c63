"""The tables of the collections store, in types that SQLite and PostgreSQL share."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData()

collections = Table(
    "collections",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("weights_sha256", String(64), nullable=False),
    Column("preprocess", String, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("source", String, nullable=False),
    Column("created", String(32), nullable=False),
)
"""One row a collection; `source` is the fingerprint of the data set it was built from, empty where clients filled it."""

items = Table(
    "items",
    metadata,
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("collection", String(64), ForeignKey("collections.name"), nullable=False),
    Column("id", String(256), nullable=False),
    Column("label", String),
    Column("metadata", JSON, nullable=False),
    Column("vector", LargeBinary, nullable=False),
    Column("thumbnail", LargeBinary),
    UniqueConstraint("collection", "id"),
    sqlite_autoincrement=True,
)
"""One row an item; `vector` is float32, little-endian, as the network gave it."""
