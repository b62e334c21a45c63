"""KServe v2 tensors: wire bytes, typed contents or JSON in, numpy out, and back.

BYTES tensors are numpy arrays of dtype object that hold `bytes`. On every wire an element is written as a 4-byte
little-endian length and then its bytes. (Open Inference Protocol, "Tensor data"; extension_binary_data.)
"""

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data.errors import InputError

MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 31
"""Largest product of the sizes above 0: no message carries more, and numpy counts bytes in 64 bits even where a size is 0."""
KEPT_SHAPES = 256
"""Shapes whose size is remembered: most requests of a client have the same."""
PIECE = 1 << 16
"""Numbers of a sequence that are read at a time: some milliseconds."""
MAX_ELEMENTS = 1 << 16
"""Images or texts in one BYTES tensor: far more than a request may have rows, few enough to count."""
NUMPY_OF = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""Datatype on the wire -> numpy dtype."""


@dataclass(frozen=True)
class TensorSpec:
    """A model's input or output: what metadata says, and what a request is checked against."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """With the batch axis; -1 is any size."""
    optional: bool = False
    formats: tuple[str, ...] = ()
    """Of an output: the other forms that a request may ask for (see `formats`); of one in such a form: that."""
    classes: tuple[str, ...] = ()
    """Names of what the numbers of a row stand for, where they have some."""
    shades: bool = False
    """Of an input: RGB images of UINT8, [N,H,W,3] or [N,3,H,W], are taken too."""


@dataclass(slots=True)
class Tensor:
    """A named input of a request, as it came, before any model looked at it."""

    name: str
    datatype: str
    array: np.ndarray


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Tensor:
    """A tensor from its wire bytes. Raises InputError when bytes and shape disagree.

    Numbers are not copied, and begin at any byte of the message: NumPy reads them so, a runtime may not.
    """
    dtype = _dtype(name, datatype)
    size = _element_count(name, shape, datatype)
    if datatype == "BYTES":
        elements = _split_elements(name, bytes(raw), size)
        if len(elements) != size:
            held = "more" if len(elements) > size else len(elements)
            raise InputError(f"input {name!r}: shape {list(shape)} asks for {size} elements, its bytes hold {held}")
        return Tensor(name, datatype, object_array(elements, shape))
    if len(raw) != size * dtype.itemsize:
        raise InputError(
            f"input {name!r}: shape {list(shape)} of {datatype} is {size * dtype.itemsize} bytes, and {len(raw)} came"
        )
    return Tensor(name, datatype, np.frombuffer(raw, dtype).reshape(shape))


def from_values(name: str, datatype: str, shape: Sequence[int], values: Any) -> Tensor:
    """A tensor from a flat or nested sequence (protobuf's typed contents, JSON `data`). Raises InputError."""
    dtype = _dtype(name, datatype)
    size = _element_count(name, shape, datatype)
    if datatype == "BYTES":
        flat: Any = list(_flatten(values))
        if not all(isinstance(element, bytes) for element in flat):
            raise InputError(f"input {name!r}: BYTES wants strings, other values came")
    else:
        try:
            flat = _numbers(values, dtype)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"input {name!r}: its data is not a regular array of {datatype} numbers") from error
    if len(flat) != size:
        raise InputError(f"input {name!r}: shape {list(shape)} asks for {size} elements, {len(flat)} came")
    return Tensor(name, datatype, object_array(flat, shape) if datatype == "BYTES" else flat.reshape(shape))


def _numbers(values: Any, dtype: np.dtype) -> np.ndarray:
    """A flat or nested sequence as one row of numbers, read in pieces: NumPy holds the interpreter's lock while it reads one.

    Raises ValueError, TypeError or OverflowError for what is no regular array of this kind.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return _piece(values, dtype).reshape(-1)
    step = max(1, PIECE // max(1, np.size(values[0])))
    pieces = [_piece(values[start : start + step], dtype) for start in range(0, len(values), step)]
    return np.concatenate(pieces).reshape(-1)


def _piece(values: Any, dtype: np.dtype) -> np.ndarray:
    """Numbers of this kind as they came: NumPy would also read texts, truths and fractions as whole numbers."""
    came = np.asarray(values)
    if dtype.kind == "b":
        kind = came.dtype.kind == "b" or not came.size
    else:
        whole = dtype.kind == "f" or came.dtype.kind != "f" or bool((came == np.trunc(came)).all())
        large = came.dtype.kind == "O" and all(isinstance(one, int) for one in came.flat)  # beyond 64 bits; and no null
        kind = (came.dtype.kind in "iuf" or large) and whole
    if not kind:
        raise TypeError
    with np.errstate(over="ignore"):  # what is too large for its type is infinite in it
        return came.astype(dtype) if dtype.kind == came.dtype.kind == "f" else np.asarray(values, dtype)


def from_json(name: str, datatype: str, shape: Sequence[int], values: Any, content_type: str | None) -> Tensor:
    """A tensor from JSON `data`. Strings are UTF-8 text, or base64 where the input's parameter `content_type` says so."""
    if datatype != "BYTES":
        return from_values(name, datatype, shape, values)
    if content_type not in (None, "base64", "str"):
        raise InputError(
            f"input {name!r}: content_type {content_type!r:.40} is unknown; wanted base64, or str for text"
        )
    texts = list(_flatten(values))
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"input {name!r}: BYTES data in JSON wants strings, other values came")
    if content_type != "base64":
        return from_values(name, datatype, shape, [text.encode() for text in texts])
    try:
        return from_values(name, datatype, shape, [base64.b64decode(text, validate=True) for text in texts])
    except (binascii.Error, ValueError) as error:
        raise InputError(f"input {name!r}: its data is not base64 ({error})") from error


def to_raw(array: np.ndarray) -> bytes:
    """The wire bytes of an array; BYTES elements get their length prefixes."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(element)) + element for element in array.reshape(-1))
    return np.ascontiguousarray(array).tobytes()


def to_json(array: np.ndarray) -> list[str] | np.ndarray:
    """A flat list or array, as Triton writes it. BYTES become text: ids and labels are text by construction."""
    if array.dtype == object:
        return [element.decode("utf-8", "replace") for element in array.reshape(-1)]
    return array.reshape(-1)


def object_array(elements: Sequence[bytes], shape: Sequence[int] | None = None) -> np.ndarray:
    """A BYTES array; `np.array(list_of_bytes)` would cut trailing zero bytes off."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape if shape is not None else (len(elements),))


def _dtype(name: str, datatype: str) -> np.dtype:
    if datatype not in NUMPY_OF:
        raise InputError(f"input {name!r}: datatype {datatype!r} is unknown; known: {', '.join(NUMPY_OF)}")
    return NUMPY_OF[datatype]


def _element_count(name: str, shape: Sequence[int], datatype: str) -> int:
    try:
        count = _product(tuple(shape))
    except ValueError as error:
        raise InputError(f"input {name!r}: {error}") from error
    if datatype == "BYTES" and count > MAX_ELEMENTS:
        raise InputError(
            f"input {name!r}: shape {list(shape)} asks for {count} elements; wanted at most {MAX_ELEMENTS}"
        )
    return count


@lru_cache(KEPT_SHAPES)
def _product(shape: tuple[int, ...]) -> int:
    """How many elements a shape has, remembered. Raises ValueError for no shape, which is not."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"its shape has {len(shape)} dimensions; wanted at most {MAX_DIMENSIONS}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {list(shape)} has a negative size")
    if math.prod(size or 1 for size in shape) > MAX_SIZE:
        raise ValueError(f"shape {list(shape)!s:.200} is for more than {MAX_SIZE} elements; send fewer")
    return math.prod(shape)


def _split_elements(name: str, raw: bytes, most: int) -> list[bytes]:
    """The elements; reading ends with one more than `most`."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) <= most:
        stop = at + 4
        if stop <= len(raw):
            stop += struct.unpack_from("<I", raw, at)[0]
        if stop > len(raw) or at + 4 > len(raw):
            raise InputError(
                f"input {name!r}: element {len(elements)} is cut short; "
                "each element is a 4-byte little-endian length and then its bytes"
            )
        elements.append(raw[at + 4 : stop])
        at = stop
    return elements


def _flatten(values: Any) -> Any:
    """The leaves of nested lists, without recursion: the nesting is the client's."""
    stack = [iter(values if isinstance(values, list | tuple) else [values])]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list | tuple):
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()
