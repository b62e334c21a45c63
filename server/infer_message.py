"""ModelInfer's message without copies of its tensors: the raw contents are found in the received bytes and left there.

A protobuf message is a row of fields, each a tag and a value, and may be cut between them: the large fields stay where they are, the others
are read by protobuf as ever. Reading everything by protobuf would copy each tensor twice, and asking it for the message's size once more;
for one image of 602 KB that is half of what the front end costs. (Protocol Buffers, "Encoding".)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2 as pb

RAW_FIELD = pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_RAW_TAG = RAW_FIELD << 3 | 2  # 2: a length and so many bytes


@dataclass(frozen=True)
class InferMessage:
    """A ModelInferRequest; `fields` is everything but its raw contents."""

    fields: Any
    raw: Sequence[memoryview]
    nbytes: int

    @property
    def id(self) -> str:
        """What the client calls the request."""
        return str(self.fields.id)


def read_infer(data: bytes) -> InferMessage:
    """The message in these bytes. Raises protobuf's DecodeError."""
    raw, rest, view = [], [], memoryview(data)
    at = start = 0
    try:
        while at < len(data):
            tag, value = _varint(data, at)
            value, end = _bounds(data, tag, value)
            if tag == _RAW_TAG:
                rest.append(view[start:at])
                raw.append(view[value:end])
                start = end
            at = end
    except (IndexError, ValueError):  # broken, or older than any of our clients: protobuf's own reader decides
        whole = pb.ModelInferRequest.FromString(data)
        return InferMessage(whole, [memoryview(one) for one in whole.raw_input_contents], len(data))
    rest.append(view[start:])
    return InferMessage(pb.ModelInferRequest.FromString(b"".join(rest)), raw, len(data))


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
