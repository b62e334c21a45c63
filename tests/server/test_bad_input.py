"""What cannot be answered is refused in one line with the right code, on every wire, and the next request is answered."""

import resource
import struct

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.tensors import _split_elements
from tests.server.conftest import MAX_MESSAGE_MB, QUEUE_ROWS
from tests.server.images import BAD_IMAGES, bomb, png
from tests.server.wires import images, refused

pytestmark = pytest.mark.usefixtures("goes_on_serving")
GOOD = images(png(0))
PIXELS = np.zeros((1, 3, 32, 32), np.float32)
VECTOR = np.ones((1, 48), np.float32)


@pytest.mark.parametrize("what", BAD_IMAGES)
@pytest.mark.parametrize("model", ["embedding", "attention", "depth", "knn"])
def test_a_bad_image_is_named_by_its_row(wire, model, what):
    make, words = BAD_IMAGES[what]
    kind, line = refused(wire.infer, model, images(png(0), make(), png(1)))
    assert kind == "invalid"
    assert line.startswith("image[1]: ")
    assert any(word in line for word in words.split("|")), line


@pytest.mark.parametrize("what", BAD_IMAGES)
@pytest.mark.parametrize("route", ["embeddings", "attention", "depth?format=png", "collections/samples/search"])
def test_a_bad_upload_is_refused(http, route, what):
    make, words = BAD_IMAGES[what]
    answer = http.post(f"/v1/{route}", files={"file": ("photo.jpg", make(), "image/jpeg")})
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert any(word in answer.json()["error"] for word in words.split("|")), answer.text


def test_a_bomb_is_refused_by_its_header(wire):
    """Decoded it would take 1.2 GB."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "20000x20000" in refused(wire.infer, "embedding", images(bomb()))[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000


NAN, INFINITE = PIXELS.copy(), PIXELS.copy()
NAN[0, 1, 2, 3], INFINITE[0, 0, 0, 0] = np.nan, np.inf

REQUESTS = {
    "empty batch": (("embedding", images()), "invalid", "empty batch"),
    "empty batch of pixels": (("backbone", {"pixels": PIXELS[:0]}), "invalid", "empty batch"),
    "wrong dtype": (("backbone", {"pixels": PIXELS.astype(np.int16)}), "invalid", "INT16; wanted FP32"),
    "pixels in the place of images": (("embedding", {"image": PIXELS}), "invalid", "FP32; wanted BYTES"),
    "two axes too few": (("backbone", {"pixels": PIXELS[0, 0]}), "invalid", r"shape [32, 32]; wanted [-1, 3, -1, -1]"),
    "four channels": (("backbone", {"pixels": np.zeros((1, 4, 32, 32), np.float32)}), "invalid", "shape [1, 4, 32, 32]"),
    "no height": (("backbone", {"pixels": np.zeros((1, 3, 0, 32), np.float32)}), "invalid", "does not fit"),
    "no multiple of the patch": (("backbone", {"pixels": PIXELS[:, :, :30]}), "invalid", "nearest: 24 or 32"),
    "larger than allowed": (("backbone", {"pixels": np.zeros((1, 3, 136, 8), np.float32)}), "invalid", "nearest: 128"),
    "NaN": (("backbone", {"pixels": np.concatenate([PIXELS, NAN])}), "invalid", "not finite"),
    "infinity": (("backbone", {"pixels": INFINITE}), "invalid", "not finite"),
    "embedding too short": (("knn", {"embedding": VECTOR[:, :40]}), "invalid", "shape [1, 40]; wanted [-1, 48]"),
    "embedding of zeros": (("knn", {"embedding": VECTOR * 0}), "invalid", "no direction"),
    "embedding with NaN": (("knn", {"embedding": VECTOR * np.nan}), "invalid", "not finite"),
    "both inputs of knn": (("knn", GOOD | {"embedding": VECTOR}), "invalid", "either 'image' or 'embedding'"),
    "no input": (("embedding", {}), "invalid", "wants the input image"),
    "unknown model": (("classify", GOOD), "not found", "'classify' is not served here; served: attention, backbone"),
    "a model without its head": (("segmentation", GOOD), "not found", "no segmentation head is loaded"),
    "unknown version": (("embedding", GOOD, (), {}, "7"), "not found", "no version '7'; it has 1"),
    "unknown input": (("embedding", GOOD | {"text": VECTOR}), "invalid", "no input 'text'; it has image"),
    "unknown output": (("embedding", GOOD, ["logits"]), "invalid", "no output 'logits'; it has embedding"),
    "an output twice": (("attention", GOOD, ["mask", "mask"]), "invalid", "asked for twice"),
    "unknown parameter": (("embedding", GOOD, (), {"normalise": True}), "invalid", "no parameter 'normalise'; it takes normalize"),
    "a parameter of another model": (("depth", GOOD, (), {"mass": 0.5}), "invalid", "no parameter 'mass'; it takes size"),
    "a parameter of another type": (("embedding", GOOD, (), {"normalize": "yes"}), "invalid", "wanted true or false"),
    "mass above 1": (("attention", GOOD, (), {"mass": 1.5}), "invalid", "wanted above 0 and up to 1"),
    "mass of 0": (("attention", GOOD, (), {"mass": 0.0}), "invalid", "wanted above 0 and up to 1"),
    "mass that is no number": (("attention", GOOD, (), {"mass": "nan"}), "invalid", "wanted above 0 and up to 1"),
    "size between two patches": (("attention", GOOD, (), {"size": 50}), "invalid", "nearest: 48 or 56"),
    "size without end": (("depth", GOOD, (), {"size": 10**6}), "invalid", "nearest: 128"),
    "negative size": (("depth", GOOD, (), {"size": -8}), "invalid", "nearest: 8"),
    "half a pixel": (("depth", GOOD, (), {"size": "16.5"}), "invalid", "wanted a whole number"),
    "unknown collection": (("knn", GOOD, (), {"collection": "nothing"}), "not found", "no collection 'nothing'; there are:"),
    "a collection named like a path": (("knn", GOOD, (), {"collection": "../../etc"}), "not found", "no collection"),
    "k larger than the collection": (("knn", GOOD, (), {"k": 25}), "invalid", "holds 24 items; wanted 1 to 24"),
    "k of 0": (("knn", GOOD, (), {"k": 0}), "invalid", "wanted at least 1"),
    "more rows than the queue": (("embedding", images(*[png(0)] * (QUEUE_ROWS + 1))), "too large", f"{QUEUE_ROWS} rows"),
}  # fmt: skip
"""What it is: (the arguments of `infer`, kind of refusal, what the line must say)."""


@pytest.mark.parametrize("what", REQUESTS)
def test_a_bad_request_is_refused(wire, what):
    request, kind, words = REQUESTS[what]
    got, line = refused(wire.infer, *request)
    assert (got, words in line) == (kind, True), line


def test_pixels_too_large_for_the_network_are_refused_and_not_answered_with_nan(wire):
    got, line = refused(wire.infer, "backbone", {"pixels": np.full((1, 3, 8, 8), 3e38, np.float32)})
    assert (got, "is not finite: the pixels are too large" in line) == ("invalid", True), line


def test_a_wire_deadline_that_cannot_be_met_is_told(wire):
    assert refused(wire.infer, "embedding", GOOD, (), {"timeout": 1})[0] == "late"
    assert refused(wire.infer, "embedding", GOOD, (), {"timeout": -1})[0] == "invalid"


# What only one wire can say


def model_infer(server, change):
    """Send a request for one 8x8 image, changed, as the protocol's own message; returns code and line."""
    request = service_pb2.ModelInferRequest(model_name="backbone")
    request.inputs.add(name="pixels", datatype="FP32", shape=[1, 3, 8, 8])
    request.raw_input_contents.append(bytes(4 * 3 * 64))
    change(request)
    with grpc.insecure_channel(server.addresses.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert "\n" not in caught.value.details()
    return caught.value.code(), caught.value.details()


def broken(field, value):
    def change(request):
        tensor = request.inputs[0]
        if field == "raw":
            request.raw_input_contents[0] = value
        elif field == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        else:
            setattr(tensor, field, value)

    return change


def as_image(raw):
    def change(request):
        request.model_name = "embedding"
        del request.inputs[:]
        request.inputs.add(name="image", datatype="BYTES", shape=[1])
        request.raw_input_contents[0] = raw

    return change


MESSAGES = {
    "too few bytes": (broken("raw", bytes(760)), "is 768 bytes, and 760 came"),
    "too many bytes": (broken("raw", bytes(772)), "is 768 bytes, and 772 came"),
    "negative shape": (broken("shape", [1, 3, -8, -8]), "has a negative size"),
    "a shape that overflows": (broken("shape", [2**62, 3, 8, 8]), "is for more than"),
    "a shape of no rows without end": (broken("shape", [0, 3, 2**62, 2**62]), "is for more than"),
    "a shape of no rows that numpy cannot hold": (broken("shape", [0, 2**31, 2**31, 2**31]), "is for more than"),
    "a shape of more bytes than there are": (broken("shape", [2**23, 3, 8, 8]), "bytes, and 768 came"),
    "a shape of 65 dimensions": (broken("shape", [1] * 65), "has 65 dimensions; wanted at most 8"),
    "unknown datatype": (broken("datatype", "FP33"), "datatype 'FP33' is unknown"),
    "FP16": (broken("datatype", "FP16"), "is 384 bytes"),
    "more raw contents than inputs": (lambda r: r.raw_input_contents.append(b""), "1 inputs and 2 raw_input_contents"),
    "raw and typed contents": (lambda r: r.inputs[0].contents.fp32_contents.append(1), "typed contents beside"),
    "no contents": (lambda r: r.raw_input_contents.pop(), "asks for 192 elements, 0 came"),
    "the same input twice": (
        lambda r: (r.inputs.add().CopyFrom(r.inputs[0]), r.raw_input_contents.append(bytes(768))), "came twice",
    ),
    "an element cut short": (as_image(struct.pack("<I", 1000) + b"abc"), "element 0 is cut short"),
    "a length cut short": (as_image(b"\x01\x00"), "element 0 is cut short"),
    "a length without end": (as_image(b"\xff\xff\xff\xff"), "element 0 is cut short"),
    "two elements for one": (as_image(bytes(8)), "asks for 1 elements, its bytes hold more"),
    "a name without end": (broken("name", "x" * 100_000), "no input 'xxx"),
}  # fmt: skip


@pytest.mark.parametrize("what", MESSAGES)
def test_a_message_that_contradicts_itself_is_refused(server, what):
    change, words = MESSAGES[what]
    code, line = model_infer(server, change)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in line


def test_a_message_that_is_no_message_is_refused(server):
    with grpc.insecure_channel(server.addresses.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a ModelInfer message" in caught.value.details()


def test_a_message_beyond_the_limit_is_refused(server):
    code, _ = model_infer(server, broken("raw", bytes((MAX_MESSAGE_MB << 20) + 1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_flood_of_empty_elements_is_refused_without_reading_them_all(server):
    """Of 3 MB of zeros, 786,432 elements, two are read; other clients do not wait meanwhile."""
    code, line = model_infer(server, as_image(bytes(3 << 20)))
    assert (code, "its bytes hold more" in line) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert _split_elements("image", bytes(1 << 20), 1) == [b"", b""]


def test_a_count_of_elements_beyond_all_batches_is_refused(server):
    code, line = model_infer(server, lambda r: (as_image(b"")(r), r.inputs[0].shape.__setitem__(0, 1 << 30)))
    assert (code, "wanted at most 65536" in line) == (grpc.StatusCode.INVALID_ARGUMENT, True)


OFFERED_ELSEWHERE = {
    "TraceSetting": service_pb2.TraceSettingRequest(),
    "LogSettings": service_pb2.LogSettingsRequest(),
    "CudaSharedMemoryStatus": service_pb2.CudaSharedMemoryStatusRequest(),
}


@pytest.mark.parametrize("method", OFFERED_ELSEWHERE)
def test_what_only_other_servers_offer_is_unimplemented_in_words(server, method):
    with grpc.insecure_channel(server.addresses.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), method)(OFFERED_ELSEWHERE[method])
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details().startswith(f"{method} is not offered by this server")


def test_a_complaint_about_long_words_of_any_script_reaches_its_client_every_time(server):
    """Above 8 KB of headers gRPC refuses by chance, with a code that asks clients to try again."""

    def change(request):
        request.parameters["🦉" * 1000].string_param = "x"

    for _ in range(30):
        code, line = model_infer(server, change)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "has no parameter" in line
