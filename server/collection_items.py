"""What a collection holds, what it may be called, and what is checked before an item is stored."""

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data.errors import InputError
from server.errors import Conflict
from server.json_text import check_json, parse_kept

T = TypeVar("T")
R = TypeVar("R")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_ID = 256
"""Characters."""
ID = re.compile(rf"[^\x00-\x1f\x7f/]{{1,{MAX_ID}}}")
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
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
    """Empty is none: so files have it, and so searches show it."""
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


def item_row(collection: str, item: NewItem, dimension: int) -> dict[str, Any]:
    """The item as a row of its table; one without an id gets one. Raises InputError."""
    vector = np.ascontiguousarray(item.vector, "<f4")
    if vector.shape != (dimension,):
        raise InputError(f"an embedding has {vector.size} numbers; this network's have {dimension}")
    with np.errstate(over="ignore"):
        length = np.linalg.norm(vector)
    if not 0 < length < np.inf:
        raise InputError("an embedding is zero or not finite, so it has no direction to compare")
    if item.id is not None and (not ID.fullmatch(item.id) or item.id in (".", "..")):
        raise InputError(
            f"id {item.id!r:.80}: wanted 1 to 256 characters, no control characters, no '/', and not '.' or '..'"
        )
    if item.label is not None:
        check_label(item.label)
    return {
        "collection": collection,
        "id": item.id if item.id is not None else uuid.uuid4().hex,
        "label": item.label or None,
        "metadata": item.metadata or {},
        "vector": vector.tobytes(),
        "thumbnail": item.thumbnail,
    }


def numbered(items: Sequence[T], make: Callable[[T], R]) -> list[R]:
    """What is made of each item. Raises InputError that says of which."""
    made: list[R] = []
    try:
        for item in items:
            made.append(make(item))
    except InputError as error:
        raise InputError(f"item {len(made)}: {error}") from error
    return made


def check_label(label: str) -> str:
    """The label, if it may be one: a database may not keep control characters, or end a text at one. Raises InputError."""
    if CONTROLS.search(label):
        raise InputError(f"label {label!r:.80}: wanted no control characters")
    return label


def metadata_of(text: str) -> dict[str, Any]:
    """A file's metadata column. Raises InputError."""
    try:
        value = parse_kept(text.encode())
    except InputError as error:
        raise InputError(f"metadata {text!r:.80} is no JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"metadata {text!r:.80} is no JSON object")
    check_json(value, f"metadata {text!r:.80}")
    return value


def check_name(name: str) -> str:
    """The name, if it may be one. Raises InputError."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"collection name {name!r:.80}: wanted 1 to 64 of a-z, 0-9, '-' and '_', a letter or digit first"
        )
    return name


def check_writable(name: str) -> None:
    """Raise InputError for what is no name, Conflict for the one that clients may not write to."""
    if check_name(name) == SAMPLES:
        raise Conflict(f"collection {SAMPLES!r} is built by the server from its sample images; use a name of your own")
