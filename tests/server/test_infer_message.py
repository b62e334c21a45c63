"""A gRPC request read without copying its tensors says what protobuf's own reader says, whole, cut or broken."""

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from server.infer_message import read_infer


def message() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="backbone", id="one")
    request.parameters["timeout"].int64_param = 5
    for n in range(2):
        request.inputs.add(name=f"in{n}", datatype="FP32", shape=[1, n + 1])
        request.raw_input_contents.append(np.full(n + 1, n, np.float32).tobytes())
    request.raw_input_contents.append(b"")
    request.outputs.add(name="embedding")
    return request


def agree(data: bytes) -> None:
    """Both read it alike, or both refuse it."""
    try:
        wanted = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_infer(data)
        return
    found = read_infer(data)
    assert [bytes(one) for one in found.raw] == list(wanted.raw_input_contents)
    assert (found.nbytes, found.id) == (len(data), wanted.id)
    del wanted.raw_input_contents[:]
    del found.fields.raw_input_contents[:]
    assert found.fields == wanted


def test_the_tensors_are_the_received_bytes_themselves():
    data = message().SerializeToString()
    assert all(one.obj is data for one in read_infer(data).raw)
    agree(data)


def test_fields_may_come_in_any_order_and_unknown_ones_among_them():
    request = message()
    parts = [pb.ModelInferRequest(raw_input_contents=[one]).SerializeToString() for one in request.raw_input_contents]
    del request.raw_input_contents[:]
    rest = request.SerializeToString()
    unknown = b"\xa2\x06\x03abc" + b"\xad\x06\x00\x00\x00\x00" + b"\xb1\x06" + bytes(8) + b"\xb8\x06\x96\x01"
    agree(parts[0] + rest + parts[1] + unknown + parts[2])
    agree(rest + rest + b"".join(parts))
    agree(b"")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_cut_or_changed_is_read_as_protobuf_reads_it(seed):
    rng, data = random.Random(seed), message().SerializeToString()
    for _ in range(200):
        changed = bytearray(data[: rng.randrange(len(data) + 1)])
        for _ in range(rng.randrange(3)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        agree(bytes(changed))
