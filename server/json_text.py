"""JSON in and out: strict, and without keeping other clients waiting for a large text.

Whoever reads or writes JSON holds the interpreter's lock, in whatever thread. orjson holds it for a few milliseconds a megabyte, where
Python's own module takes ten times as long, and what is written here is written in pieces between which other threads get their turn.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from data.errors import InputError

MAX_NESTING = 64
"""Lists and objects inside each other in what is stored; readers and writers take more, but not all of them the same."""
READ_NESTING = 256
"""The same in what is read at all: a quarter of what orjson takes, so that whoever copies it or shows it in a complaint can follow."""
PIECE = 1 << 16
"""Numbers that are written at a time: some milliseconds."""
PARTED = 4
"""Levels of a reply that are written piece by piece: `items`, an item's fields, and in those lists of such objects."""
_BOXES = frozenset((dict, list))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NO_NUMBER = re.compile("NaN|-?Infinity")
"""What Python's own writer makes of numbers that are not finite."""


def parse_json(body: bytes) -> Any:
    """The body, in UTF-8, as JSON. Raises InputError with the place where it breaks, and for what is nested deeper than `READ_NESTING`.

    No NaN, no numbers beyond all doubles, no halves of characters: what was read can be written again.
    """
    try:
        value = orjson.loads(body.removeprefix(_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        near = _NO_NUMBER.search(error.doc, max(0, error.pos - 1), error.pos + 9)
        what = f"{near[0]} is not finite, and JSON has no word for it" if near else f"{error!s:.120}"
        raise InputError(f"the request is not JSON: {what}") from error
    if body.count(b"[") + body.count(b"{") > READ_NESTING:  # hardly anything has so many
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Look at lists and objects alone: tensors may have millions of numbers."""
    level, depth = [value], 0
    while level := [inner for box in level for inner in _boxes_in(box)]:
        depth += 1
        if depth >= READ_NESTING:
            raise InputError(f"the request is nested more than {READ_NESTING} deep; send it flatter")


def _boxes_in(box: Any) -> list[Any]:
    inside = box.values() if isinstance(box, dict) else box
    return [] if _BOXES.isdisjoint(map(type, inside)) else [one for one in inside if type(one) in _BOXES]


def parse_kept(body: bytes) -> Any:
    """The same for what is stored: whole numbers beyond 64 bits, which orjson reads as the nearest double, come back as they were sent."""
    value = parse_json(body)
    return exactly(body) if may_be_rounded(value) else value


def exactly(body: bytes) -> Any:
    """What `parse_json` has read once, by Python's reader: slow, and exact."""
    return json.loads(body.removeprefix(_BYTE_ORDER_MARK))


def may_be_rounded(value: Any) -> bool:
    """Whether a number in it is so large that it may have been sent as a whole one, and was not read as one."""
    return any(isinstance(one, float) and abs(one) >= 1 << 63 for level in _levels(value) for one in level)


def check_json(value: Any, what: str) -> None:
    """Raise InputError for JSON that is nested too deep to be stored."""
    for depth, _ in enumerate(_levels(value), start=1):
        if depth > MAX_NESTING:
            raise InputError(f"{what} is nested more than {MAX_NESTING} deep; send it flatter")


def _levels(value: Any) -> Iterator[list[Any]]:
    """The value, what is in it, what is in that, ...: without recursion, as the nesting is the client's."""
    level = [value]
    while level:
        yield level
        boxes = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for box in boxes for inner in box]


def write_json(value: Any) -> bytes:
    """The text of objects, lists, plain values and NumPy's arrays; float32 as doubles, so that they are read back as they were.

    Raises InputError for an array that is not finite.
    """
    return b"".join(_pieces(value, 0))


def _pieces(value: Any, level: int) -> Iterator[bytes]:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError("an output is not finite, which JSON has no words for; ask for binary tensors")
        yield from _rows(value)
    elif isinstance(value, dict) and value and level < PARTED:
        before = b"{"
        for name, inner in value.items():
            yield before + orjson.dumps(name) + b":"
            yield from _pieces(inner, level + 1)
            before = b","
        yield b"}"
    elif isinstance(value, list) and value and level < PARTED:
        before = b"["
        for inner in value:
            yield before
            yield from _pieces(inner, level + 1)
            before = b","
        yield b"]"
    else:
        yield _plain(value)


def _plain(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # a whole number beyond 64 bits
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _rows(array: np.ndarray) -> Iterator[bytes]:
    if array.size <= PIECE:
        yield _numbers(array)
        return
    before = b"["
    for start in range(0, len(array), PIECE if array.ndim == 1 else 1):
        yield before
        if array.ndim == 1:
            yield _numbers(array[start : start + PIECE])[1:-1]
        else:
            yield from _rows(array[start])
        before = b","
    yield b"]"


def _numbers(array: np.ndarray) -> bytes:
    plain = np.ascontiguousarray(array, np.float64 if array.dtype.kind == "f" else None)
    return orjson.dumps(plain, option=orjson.OPT_SERIALIZE_NUMPY)
