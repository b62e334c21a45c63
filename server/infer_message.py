"""ModelInfer's message without copies of its tensors: the raw contents are found in the received bytes and left there.

A protobuf message is a row of fields, each a tag and a value, and may be cut between them: the large fields stay where they are, the others
are read by protobuf as ever. Reading everything by protobuf would copy each tensor twice, and asking it for the message's size once more;
for one image of 602 KB that is half of what the front end costs. A client's requests mostly differ in their tensors and ids alone, so that
what is read of the rest is kept. (Protocol Buffers, "Encoding".)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tritonclient.grpc import service_pb2 as pb

_NUMBERS = pb.ModelInferRequest.DESCRIPTOR.fields_by_name
_RAW_TAG, _ID_TAG = (_NUMBERS[name].number << 3 | 2 for name in ("raw_input_contents", "id"))  # 2: a length, then bytes
KEPT_HEAD, KEPT_HEADS = 2048, 256
"""Bytes of a head that is kept once it was read, and how many are: they are few and small, unless somebody makes them otherwise."""


@dataclass(eq=False, slots=True)
class InferMessage:
    """A ModelInferRequest in parts."""

    fields: Any
    """All but raw contents and id. Messages share it where their heads are equal: nobody may write to it."""
    id: str
    """What the client calls the request."""
    raw: Sequence[memoryview]
    nbytes: int
    head: bytes | None = None
    """The bytes of `fields`, where those are shared."""


def read_infer(data: bytes) -> InferMessage:
    """The message in these bytes. Raises protobuf's DecodeError."""
    raw, rest, view = [], [], memoryview(data)
    at = start = 0
    called = ""
    try:
        while at < len(data):
            tag, end = data[at], at + 2
            if tag & 0x87 == 2 and (length := data[at + 1]) < 128:  # a length, then bytes, both numbers in a byte
                value, end = end, end + length
                if end > len(data) or tag < 8:
                    raise IndexError(end)
            else:
                tag, value = _varint(data, at)
                value, end = _bounds(data, tag, value)
            if tag in (_RAW_TAG, _ID_TAG):
                rest.append(view[start:at])
                start = end
                if tag == _RAW_TAG:
                    raw.append(view[value:end])
                else:
                    called = data[value:end].decode()
            at = end
    except (IndexError, ValueError):  # broken, or older than any of our clients: protobuf's own reader decides
        whole = pb.ModelInferRequest.FromString(data)
        return InferMessage(whole, whole.id, [memoryview(one) for one in whole.raw_input_contents], len(data))
    rest.append(view[start:])
    head = b"".join(rest)
    if len(head) > KEPT_HEAD:
        return InferMessage(pb.ModelInferRequest.FromString(head), called, raw, len(data))
    return InferMessage(read_head(head), called, raw, len(data), head)


@lru_cache(KEPT_HEADS)
def read_head(head: bytes) -> Any:
    """A head's fields, remembered. Raises protobuf's DecodeError."""
    return pb.ModelInferRequest.FromString(head)


def _bounds(data: bytes, tag: int, at: int) -> tuple[int, int]:
    """Where the value behind a tag begins, its length left out, and ends. Raises IndexError or ValueError."""
    kind = tag & 7
    if kind == 0:
        end = _varint(data, at)[1]
    elif kind == 2:
        length, at = _varint(data, at)
        end = at + length
    elif kind in (1, 5):
        end = at + (8 if kind == 1 else 4)
    else:
        raise ValueError(kind)
    if end > len(data) or tag >> 3 == 0:
        raise IndexError(end)
    return at, end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends. Raises IndexError or ValueError."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > 63:
            raise ValueError(at)
