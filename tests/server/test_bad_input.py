"""What cannot be answered is refused in one line with the right code, on every wire, and the next request is answered."""

import json
import resource
import struct

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.tensors import _split_elements
from tests.server.conftest import MAX_MESSAGE_MB, QUEUE_ROWS
from tests.server.images import BAD_IMAGES, bomb, png
from tests.server.wires import Refused, images, open_wire

GOOD = images(png(0))
PIXELS = np.zeros((1, 3, 32, 32), np.float32)
VECTOR = np.ones((1, 48), np.float32)


@pytest.fixture(autouse=True)
def _goes_on_serving(server):
    """After each test the server still answers, on both ports."""
    yield
    for name in ("grpc", "http"):
        opened = open_wire(name, server.addresses)
        assert opened.infer("embedding", GOOD)["embedding"].shape == (1, 48)
        opened.close()


def refused(call, *args, **kwargs):
    with pytest.raises(Refused) as caught:
        call(*args, **kwargs)
    line = caught.value.line
    assert "\n" not in line
    assert "Traceback" not in line
    assert "the server failed" not in line
    return caught.value.kind, line


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
    "NaN": (("backbone", {"pixels": np.concatenate([PIXELS, NAN])}), "invalid", "row 1 holds values that are not finite"),
    "infinity": (("backbone", {"pixels": INFINITE}), "invalid", "row 0 holds values that are not finite"),
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


PIXELS_JSON = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}
IMAGE_JSON = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"}}


def without(key):
    return {name: value for name, value in PIXELS_JSON.items() if name != key}


BODIES = {
    "no JSON": ("backbone", b"{", "not JSON"),
    "an empty body": ("backbone", b"", "not JSON"),
    "JSON with a mistake": ("backbone", b'{"inputs": [}', "not JSON: Expecting value"),
    "not UTF-8": ("backbone", b'{"id": "\xff"}', "not JSON"),
    "nested without end": ("backbone", b"[" * 100_000, "not JSON"),
    "a list": ("backbone", [], "a JSON list; wanted an object"),
    "inputs that are no list": ("backbone", {"inputs": 3}, "'inputs' is a JSON int"),
    "an input that is no object": ("backbone", {"inputs": [3]}, "an element of 'inputs' is a JSON int"),
    "parameters that are no object": ("backbone", {"inputs": [PIXELS_JSON], "parameters": 3}, "'parameters' is a JSON int"),
    "no name": ("backbone", {"inputs": [without("name")]}, "'name' is None"),
    "no shape": ("backbone", {"inputs": [without("shape")]}, "'shape' is None"),
    "no data": ("backbone", {"inputs": [without("data")]}, "neither 'data' nor"),
    "too little data": ("backbone", {"inputs": [PIXELS_JSON | {"data": [0.0]}]}, "asks for 192 elements, 1 came"),
    "ragged data": ("backbone", {"inputs": [PIXELS_JSON | {"data": [[0.0], [0.0, 1.0]]}]}, "not a regular array"),
    "words for numbers": ("backbone", {"inputs": [PIXELS_JSON | {"data": ["x"] * 192}]}, "not a regular array"),
    "binary that did not come": (
        "backbone", {"inputs": [without("data") | {"parameters": {"binary_data_size": 768}}]}, "0 bytes follow",
    ),
    "a shape of 65 dimensions": ("backbone", {"inputs": [PIXELS_JSON | {"shape": [1] * 65}]}, "has 65 dimensions"),
    "a shape without end": ("backbone", {"inputs": [PIXELS_JSON | {"shape": [0, 2**63]}]}, "is for more than"),
    "no rows of images without end": ("embedding", {"inputs": [IMAGE_JSON | {"shape": [0, 2**40], "data": []}]}, "is for more than"),
    "half a character": ("embedding", json.dumps({"inputs": [IMAGE_JSON | {"data": ["\ud800"]}]}).encode(), "not JSON"),
    "half a character, not escaped": ("knn", b'{"inputs": [], "parameters": {"collection": "\xed\xa0\x80"}}', "not JSON"),
    "UTF-16": ("backbone", '{"id": "\\ud800", "inputs": []}'.encode("utf-16"), "not JSON"),
    "an id that is no number": ("backbone", b'{"id": NaN, "inputs": []}', "'id' is nan; wanted text"),
    "an id that is an object": ("backbone", {"id": {}, "inputs": []}, "'id' is {}; wanted text"),
    "half a character in a parameter": ("knn", b'{"inputs": [], "parameters": {"collection": "\\ud800"}}', "not JSON"),
    "a deadline without end": ("backbone", {"inputs": [PIXELS_JSON], "parameters": {"timeout": 10**400}}, "parameter 'timeout'"),
    "classification": (
        "backbone",
        {"inputs": [PIXELS_JSON], "outputs": [{"name": "embedding", "parameters": {"classification": 3}}]},
        "'embedding' asks for classification",
    ),
    "an output in shared memory without its size": (
        "backbone",
        {"inputs": [PIXELS_JSON], "outputs": [{"name": "embedding", "parameters": {"shared_memory_region": "x"}}]},
        "wanted shared_memory_region as text, shared_memory_byte_size",
    ),
    "no base64": ("embedding", {"inputs": [IMAGE_JSON | {"data": ["%%%"]}]}, "not base64"),
    "numbers for images": ("embedding", {"inputs": [IMAGE_JSON | {"data": [3]}]}, "wants strings"),
    "unknown content type": (
        "embedding", {"inputs": [IMAGE_JSON | {"data": [""], "parameters": {"content_type": "hex"}}]}, "'hex' is unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_cannot_be_read_is_refused(http, what):
    model, body, words = BODIES[what]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = http.post(f"/v2/models/{model}/infer", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "10", b"\xb2", "1" * 5000])
def test_a_wrong_header_length_is_refused(http, length):
    body = json.dumps({"inputs": [PIXELS_JSON]}).encode()
    answer = http.post("/v2/models/backbone/infer", content=body, headers={"Inference-Header-Content-Length": length})
    assert answer.status_code == 400


@pytest.mark.parametrize("given", ["0", "-1", "1.5", b"\xb2", "9" * 400, "1" * 5000])
def test_a_wrong_deadline_header_is_refused(http, given):
    answer = http.post("/v2/models/backbone/infer", json={"inputs": [PIXELS_JSON]}, headers={"X-Timeout-Ms": given})
    assert (answer.status_code, "X-Timeout-Ms" in answer.json()["error"]) == (400, True)


def test_left_over_bytes_are_refused(http):
    text = json.dumps({"inputs": [PIXELS_JSON]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = http.post("/v2/models/backbone/infer", content=text + b"more", headers=headers)
    assert (answer.status_code, "4 bytes are left over" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_a_body_in_a_broken_coding_is_refused(http, coding):
    answer = http.post("/v2/models/backbone/infer", content=b"not gzip", headers={"content-encoding": coding})
    assert answer.status_code == 400
    assert coding in answer.json()["error"]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("route", ["/v2/models/backbone/infer", "/v1/embeddings"])
def test_a_body_beyond_the_limit_is_refused(http, route, announced):
    body = bytes((MAX_MESSAGE_MB << 20) + 1)
    content = body if announced else (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    try:
        answer = http.post(route, content=content, headers={"content-type": "image/png"})
    except httpx.WriteError:
        pytest.skip("the server closed the connection before the client had sent everything")
    assert (answer.status_code, f"larger than {MAX_MESSAGE_MB} MB" in answer.text) == (413, True)


def test_a_small_body_that_unpacks_to_a_large_one_is_refused(http):
    import gzip

    packed = gzip.compress(bytes(64 << 20))
    answer = http.post("/v2/models/backbone/infer", content=packed, headers={"content-encoding": "gzip"})
    assert (answer.status_code, "decompressed" in answer.json()["error"]) == (413, True)


UPLOADS = {
    "no content type": ({"content": b"x", "headers": {"content-type": ""}}, "wanted multipart/form-data"),
    "JSON": ({"json": {}}, "application/json: wanted multipart/form-data"),
    "no files": ({"files": {"note": (None, "x")}}, "no image came"),
    "an empty body": ({"content": b"", "headers": {"content-type": "image/png"}}, "no image came"),
    "a form without its boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "form is broken"),
    "a form that is none": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "no image came|form is broken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UPLOADS)
def test_an_upload_without_images_is_refused(http, what):
    sent, words = UPLOADS[what]
    answer = http.post("/v1/embeddings", **sent)
    assert answer.status_code == 400
    assert any(word in answer.json()["error"] for word in words.split("|")), answer.text


ROUTES = {
    "unknown route": ("GET", "/v1/nothing", 404, "no route GET /v1/nothing"),
    "wrong method": ("GET", "/v1/embeddings", 405, "does not take GET"),
    "query of another type": ("POST", "/v1/attention?size=big", 400, "size"),
    "unknown format": ("POST", "/v1/attention?format=gif", 400, "format"),
    "a page beyond all pages": ("GET", "/v1/collections/samples/items?after=99999999999999999999", 400, "after"),
    "page size 0": ("GET", "/v1/collections/samples/items?limit=0", 400, "limit"),
    "unknown collection": ("GET", "/v1/collections/nothing/items", 404, "no collection 'nothing'"),
    "unknown item": ("GET", "/v1/collections/samples/items/nothing/thumbnail", 404, "no item 'nothing'"),
    "unknown evaluation": ("GET", "/v1/evaluations/nothing", 404, "no evaluation 'nothing'"),
    "evaluation without a body": ("POST", "/v1/evaluations", 400, ""),
    "statistics of an unknown model": ("GET", "/v2/models/nothing/stats", 404, "'nothing' is not served"),
    "readiness of an unknown version": ("GET", "/v2/models/depth/versions/2/ready", 404, "no version '2'"),
}


@pytest.mark.parametrize("what", ROUTES)
def test_a_bad_address_is_refused(http, what):
    method, path, status, words = ROUTES[what]
    answer = http.request(method, path)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


ONES = b",".join([b"1.0"] * 48)
ITEMS = {
    "no items": ({"items": []}, 400, "items"),
    "no embedding": ({"items": [{"id": "a"}]}, 400, "embedding"),
    "too short": ({"items": [{"embedding": [1.0]}]}, 400, "1 numbers; this network's have 48"),
    "zeros": ({"items": [{"embedding": [0.0] * 48}]}, 400, "zero or not finite"),
    "too large for float32": ({"items": [{"embedding": [1e300] * 48}]}, 400, "zero or not finite"),
    "a slash in the id": ({"items": [{"embedding": [1.0] * 48, "id": "a/b"}]}, 400, "no '/'"),
    "an id that is a path": ({"items": [{"embedding": [1.0] * 48, "id": ".."}]}, 400, "not '.' or '..'"),
    "NaN in the metadata": (
        b'{"items": [{"embedding": [%s], "metadata": {"a": NaN}}]}' % ONES,
        400,
        "cannot be written as JSON",
    ),
    "a number beyond all": (
        b'{"items": [{"embedding": [%s], "metadata": {"a": 1e999}}]}' % ONES,
        400,
        "cannot be written as JSON",
    ),
    "metadata without end": ({"items": [{"embedding": [1.0] * 48, "metadata": nested(952)}]}, 400, "more than 64 deep"),
    "half a character in the metadata": (
        b'{"items": [{"embedding": [%s], "metadata": {"a": "\\ud800"}}]}' % ONES,
        400,
        "not JSON",
    ),
    "half a character, not escaped": (
        b'{"items": [{"embedding": [%s], "metadata": {"a": "\xed\xa0\x80"}}]}' % ONES,
        400,
        "not JSON",
    ),
    "half a character in the id": (b'{"items": [{"embedding": [%s], "id": "\\ud800"}]}' % ONES, 400, "not JSON"),
    "the same id twice": ({"items": [{"embedding": [1.0] * 48, "id": "a"}] * 2}, 409, "comes twice"),
}


@pytest.mark.parametrize("what", ITEMS)
def test_a_bad_item_is_not_added(http, what):
    body, status, words = ITEMS[what]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = http.post("/v1/collections/bad-items/items", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text
    assert http.get("/v1/collections/bad-items/items").status_code == 404


@pytest.mark.parametrize(
    "metadata", ['{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', "[]", "{", json.dumps(nested(952))]
)
def test_metadata_that_cannot_be_listed_again_is_not_added_with_an_image(http, metadata):
    answer = http.post(
        "/v1/collections/bad-items/items", files={"file": ("x.png", png(0))}, data={"metadata": metadata}
    )
    assert answer.status_code == 400, answer.text
    assert http.get("/v1/collections/bad-items/items").status_code == 404


@pytest.mark.parametrize("field", ["id", "label", "metadata", "file"])
def test_half_a_character_in_a_form_of_an_odd_encoding_is_not_stored(http, field):
    parts = {"file": ("x.png", png(0)), field: ("\\ud800.png", png(0)) if field == "file" else (None, '["\\ud800"]')}
    form = httpx.Request("POST", "http://server", files=parts)
    kind = form.headers["content-type"] + "; charset=raw_unicode_escape"
    answer = http.post("/v1/collections/bad-items/items", content=form.read(), headers={"content-type": kind})
    assert (answer.status_code, "which is no text; send the form in UTF-8" in answer.text) == (400, True), answer.text
    assert http.get("/v1/collections/bad-items/items").status_code == 404


@pytest.mark.parametrize("name", ["Birds", "-birds", "b" * 65, "bi rds"])
def test_a_bad_collection_name_is_refused(http, name):
    answer = http.post(f"/v1/collections/{name}/items", json={"items": [{"embedding": [1.0] * 48}]})
    assert (answer.status_code, "collection name" in answer.json()["error"]) == (400, True)


def test_many_more_images_than_the_queue_holds_are_refused_at_once(http):
    answer = http.post("/v1/embeddings", files=[("file", ("x.png", png(0), "image/png"))] * (QUEUE_ROWS + 1))
    assert answer.status_code == 413
