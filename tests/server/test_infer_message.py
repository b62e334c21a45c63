"""A gRPC request read without copying its tensors says what protobuf's own reader says, whole, cut or broken."""

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
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
    fields = pb.ModelInferRequest.FromString(found.fields.SerializeToString())  # a copy: the fields are shared
    for one in (wanted, fields):
        del one.raw_input_contents[:]
        one.id = ""
    assert fields == wanted


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


def test_requests_that_differ_in_tensors_and_ids_alone_share_what_was_read_and_nothing_else():
    first, second = message(), message()
    second.id, second.raw_input_contents[0] = "two", b"abcd"
    found, other = (read_infer(one.SerializeToString()) for one in (first, second))
    assert found.fields is other.fields
    assert (found.id, other.id) == ("one", "two")
    assert (bytes(found.raw[0]), bytes(other.raw[0])) == (bytes(4), b"abcd")


def test_an_id_that_is_no_text_and_a_last_one_of_several_are_taken_as_protobuf_takes_them():
    rest = message().SerializeToString()
    agree(rest + b"\x1a\x02\xff\xfe")
    agree(rest + b"\x1a\x03two")
    agree(b"\x1a\x02\xc3\xa9" + rest.replace(b"\x1a\x03one", b""))


NAMES = st.text(max_size=8)
PARAMETERS = st.dictionaries(NAMES, st.one_of(st.booleans(), st.integers(-5, 5), NAMES), max_size=2)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message's bytes, its fields in pieces that come in any order, as a protobuf writer may send them."""
    pieces = []
    for _ in range(draw(st.integers(0, 6))):
        piece = pb.ModelInferRequest()
        kind = draw(st.sampled_from(["names", "id", "input", "output", "raw", "parameters"]))
        if kind == "names":
            piece.model_name, piece.model_version = draw(NAMES), draw(NAMES)
        elif kind == "id":
            piece.id = draw(NAMES)
        elif kind == "raw":
            piece.raw_input_contents.extend(draw(st.lists(st.binary(max_size=300), max_size=3)))
        elif kind == "input":
            shape = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
            one = piece.inputs.add(name=draw(NAMES), datatype=draw(NAMES), shape=shape)
            one.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32, allow_nan=False), max_size=3)))
        elif kind == "output":
            piece.outputs.add(name=draw(NAMES))
        for name, value in draw(PARAMETERS).items() if kind == "parameters" else ():
            field = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
            setattr(piece.parameters[name], field, value)
        pieces.append(piece.SerializeToString())
    return b"".join(pieces)


@settings(max_examples=300, deadline=None)
@given(messages())
def test_any_message_is_read_as_protobuf_reads_it(data):
    agree(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_as_protobuf_does(data):
    agree(data)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_cut_or_changed_is_read_as_protobuf_reads_it(seed):
    rng, data = random.Random(seed), message().SerializeToString()
    for _ in range(200):
        changed = bytearray(data[: rng.randrange(len(data) + 1)])
        for _ in range(rng.randrange(3)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        agree(bytes(changed))
