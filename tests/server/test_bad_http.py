"""Bodies, headers, uploads and addresses that cannot be answered over HTTP are refused in one line, and the next request is answered."""

import gzip
import json
import socket
import zlib

import httpx
import pytest

from server import describe
from tests.server.conftest import MAX_MESSAGE_MB, QUEUE_ROWS
from tests.server.images import png

pytestmark = pytest.mark.usefixtures("goes_on_serving")

PIXELS_JSON = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}
IMAGE_JSON = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"}}


def without(key):
    return {name: value for name, value in PIXELS_JSON.items() if name != key}


BODIES = {
    "no JSON": ("backbone", b"{", "not JSON"),
    "an empty body": ("backbone", b"", "not JSON"),
    "JSON with a mistake": ("backbone", b'{"inputs": [}', "not JSON: unexpected character"),
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
    "an id that is no number": ("backbone", b'{"id": NaN, "inputs": []}', "not JSON"),
    "an id that is an object": ("backbone", {"id": {}, "inputs": []}, "'id' is {}; wanted text"),
    "half a character in a parameter": ("knn", b'{"inputs": [], "parameters": {"collection": "\\ud800"}}', "not JSON"),
    "a deadline without end": ("backbone", {"inputs": [PIXELS_JSON], "parameters": {"timeout": 10**400}}, "not JSON: number is infinity"),
    "classification": (
        "backbone",
        {"inputs": [PIXELS_JSON], "outputs": [{"name": "embedding", "parameters": {"classification": 3}}]},
        "output 'embedding' has no format 'classification:3'; it has fp16",
    ),
    "no classes": (
        "backbone",
        {"inputs": [PIXELS_JSON], "outputs": [{"name": "embedding", "parameters": {"classification": 0}}]},
        "'embedding' has the parameter classification 0; wanted how many classes, at least 1",
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


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_that_is_cut_or_goes_on_after_its_end_is_refused(http, coding):
    packed = (gzip.compress if coding == "gzip" else zlib.compress)(json.dumps({"inputs": [PIXELS_JSON]}).encode())
    for body in (packed[:-1], packed + b"more", b""):
        answer = http.post("/v2/models/backbone/infer", content=body, headers={"content-encoding": coding})
        assert (answer.status_code, coding in answer.json()["error"]) == (400, True), answer.text


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
        "not JSON",
    ),
    "a number beyond all": (
        b'{"items": [{"embedding": [%s], "metadata": {"a": 1e999}}]}' % ONES,
        400,
        "not JSON",
    ),
    "deep metadata": ({"items": [{"embedding": [1.0] * 48, "metadata": nested(65)}]}, 400, "more than 64 deep"),
    "metadata without end": (
        {"items": [{"embedding": [1.0] * 48, "metadata": nested(952)}]},
        400,
        "more than 256 deep",
    ),
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


def test_a_bad_item_far_into_a_long_list_is_named(http):
    items = [{"embedding": [1.0] * 48}] * 2500
    items[2345] = {"embedding": ["x"]}
    answer = http.post("/v1/collections/bad-items/items", json={"items": items})
    assert (answer.status_code, "items.2345.embedding" in answer.json()["error"]) == (400, True), answer.text


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/collections/deep/items", '{"items": %s}'),
        ("/v1/collections/deep/items", '{"items": [{"embedding": %s}]}'),
        ("/v2/models/knn/infer", '{"id": %s, "inputs": []}'),
        ("/v2/models/knn/infer", '{"inputs": [{"name": "embedding", "datatype": "FP32", "shape": %s}]}'),
        ("/v2/repository/index", '{"ready": %s}'),
        ("/v1/evaluations", '{"evaluator": %s, "data": "colours"}'),
        ("/v1/evaluations", '{"evaluator": "knn", "data": "colours", "options": {"k": %s}}'),
    ],
)
def test_what_is_nested_too_deep_to_be_shown_is_the_requests_mistake(http, path, body):
    """Readers take some 1000 levels; whoever puts them into words has a little less room."""
    for depth in (250, 260, *range(880, 1030, 6)):
        answer = http.post(
            path, content=body % ("[" * depth + "]" * depth), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, answer.text


def test_a_recursion_of_the_servers_own_is_its_failure_and_logged(http, monkeypatch, caplog):
    def endless():
        return endless()

    monkeypatch.setattr(describe, "server_metadata", endless)
    answer = http.get("/v2")
    assert (answer.status_code, "its log has the details" in answer.text) == (500, True), answer.text
    assert [record.exc_info[0] for record in caplog.records if record.message == "internal error"] == [RecursionError]


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v2/models/backbone/infer HTTP/1.1\r\nHost: x\r\n"
BROKEN = {
    "no HTTP": (b"hello\r\n\r\n", "illegal request line"),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "conflicting Content-Length headers"),
    "a length and chunks": (
        POST + b"Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "both Content-Length and Transfer-Encoding",
    ),
    "chunks and a length, asked for the head alone": (
        POST.replace(b"POST", b"HEAD") + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", "both Content-Length",
    ),
    "a chunk without a size": (POST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", "illegal chunk header"),
}  # fmt: skip


def replies(address, sent):
    """All that comes back until the server closes the connection: the statuses, and the JSON of the last reply."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as one:
        one.sendall(sent)
        said = b"".join(iter(lambda: one.recv(4096), b""))
    heads = [part.split(b"\r\n")[0] for part in said.split(b"HTTP/1.1 ")[1:]]
    return [int(head[:3]) for head in heads], said.rpartition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("what", BROKEN)
def test_broken_http_is_refused_in_one_line_and_nothing_behind_it_is_answered(server, what):
    sent, words = BROKEN[what]
    statuses, body = replies(server.addresses.http, LIVE + sent + LIVE)
    assert (statuses, words in json.loads(body)["error"]) == ([200, 400], True), body


def test_what_breaks_after_its_answer_only_closes_the_connection(server, caplog):
    """The reply has been given: there cannot be another."""
    host, port = server.addresses.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as one:
        one.sendall(POST.replace(b"backbone", b"nothing") + b"Transfer-Encoding: chunked\r\n\r\n")
        assert one.recv(4096)[9:12] == b"404"
        one.sendall(b"x\r\n" + LIVE)
        assert one.recv(4096) == b""
    assert "Traceback" not in caplog.text
