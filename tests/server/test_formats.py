"""UINT8 images beside FP32 pixels and files; maps as FP16, UINT8 and PNG: what the numbers must be, on every wire."""

import base64
import json
from collections.abc import Iterator

import cv2
import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from data.errors import InputError
from data.preprocess import normalise
from server.formats import check_format, formatted
from server.tensors import TensorSpec
from tests.server.conftest import PREPROCESS
from tests.server.images import encode, picture
from tests.server.wires import Refused, images

SHADES = np.stack([picture(seed, 32, 32) for seed in range(3)])
WIDE = np.stack([picture(seed, 60, 90) for seed in range(2)])


@pytest.fixture(params=["grpc", "http"])
def triton(server, request) -> Iterator:
    """Both of tritonclient's clients, and their modules."""
    module = grpc_client if request.param == "grpc" else http_client
    where = server.addresses.grpc if request.param == "grpc" else server.addresses.http.removeprefix("http://")
    with module.InferenceServerClient(where) as client:
        yield module, client


def wanted(module, name: str, form: str):
    """tritonclient has no words for an output's own parameters, so they are put in by hand."""
    output = module.InferRequestedOutput(name)
    if module is grpc_client:
        output._output.parameters["format"].string_param = form
    else:
        output._parameters["format"] = form
    return output


def ask(triton, model: str, output: str, form: str, files: list[bytes]):
    module, client = triton
    tensor = module.InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object))
    answer = client.infer(model, [tensor], outputs=[wanted(module, output, form)])
    found = answer.get_output(output)
    scale = found["parameters"].get("scale") if module is http_client else found.parameters["scale"].string_param
    return answer.as_numpy(output), json.loads(scale) if scale else None


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_shades_are_normalised_as_pixels_are(wire, runtime, layout):
    sent = SHADES if layout == "NHWC" else np.ascontiguousarray(SHADES.transpose(0, 3, 1, 2))
    got = wire.infer("backbone", {"pixels": sent}, ["embedding"])["embedding"]
    pixels = np.stack([normalise(image, PREPROCESS) for image in SHADES])
    np.testing.assert_allclose(got, runtime.run(pixels)["embedding"], atol=1e-5)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_shades_in_the_place_of_files_are_seen_as_these(wire, layout):
    sent = WIDE if layout == "NHWC" else np.ascontiguousarray(WIDE.transpose(0, 3, 1, 2))
    files = images(*(encode(".png", image[:, :, ::-1]) for image in WIDE))
    for model in ("embedding", "attention", "depth"):
        from_files, from_shades = wire.infer(model, files), wire.infer(model, {"image": sent})
        for name, array in from_files.items():
            np.testing.assert_allclose(from_shades[name], array, atol=1e-5)


def test_shades_as_typed_contents(server, wire):
    request = service_pb2.ModelInferRequest(model_name="backbone")
    tensor = request.inputs.add(name="pixels", datatype="UINT8", shape=SHADES.shape)
    tensor.contents.uint_contents.extend(SHADES.ravel().tolist())
    request.outputs.add(name="embedding")
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        reply = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    got = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(reply.outputs[0].shape)
    np.testing.assert_allclose(got, wire.infer("backbone", {"pixels": SHADES}, ["embedding"])["embedding"], atol=1e-5)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (np.zeros((1, 32, 32), np.uint8), r"wanted \[N,H,W,3\] or \[N,3,H,W\]"),
        (np.zeros((1, 32, 32, 4), np.uint8), r"wanted \[N,H,W,3\] or \[N,3,H,W\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), "empty batch"),
        (np.zeros((1, 1, 32, 3), np.uint8), "32x1 pixels"),
        (np.zeros((1, 30, 32, 3), np.uint8), "multiples of 8"),
        (np.zeros((1, 32, 32, 3), np.int32), "is INT32; wanted FP32 or UINT8"),
    ],
)
def test_shades_that_are_no_images_are_refused(wire, sent, words):
    with pytest.raises(Refused, match=words) as refused:
        wire.infer("backbone", {"pixels": sent})
    assert refused.value.kind == "invalid"


def test_depth_comes_as_fp16_shades_and_files(triton, wire):
    files = [encode(".png", image) for image in WIDE]
    plain = wire.infer("depth", images(*files))["depth"]
    half, none = ask(triton, "depth", "depth", "FP16", files)
    assert (half.dtype, none) == (np.float16, None)
    np.testing.assert_array_equal(half, plain.astype(np.float16))
    spread = (plain.max(axis=(1, 2)) - plain.min(axis=(1, 2)))[:, None, None]
    shades, scale = ask(triton, "depth", "depth", "UINT8", files)
    assert (shades.dtype, shades.shape) == (np.uint8, plain.shape)
    assert (np.abs(valued(shades, scale, 255) - plain) < spread / 500).all()
    pngs, scale = ask(triton, "depth", "depth", "png", files)
    assert pngs.shape == (2,)
    decoded = np.stack([cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_UNCHANGED) for one in pngs])
    assert decoded.dtype == np.uint16
    assert (np.abs(valued(decoded, scale, 65535) - plain) < spread / 100_000).all()


def test_attention_comes_a_map_a_head(triton, wire):
    files = [encode(".png", image) for image in WIDE]
    plain = wire.infer("attention", images(*files), ["attention"])["attention"]
    pngs, scale = ask(triton, "attention", "attention", "png", files)
    assert pngs.shape == plain.shape[:2]
    decoded = np.stack([cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_UNCHANGED) for one in pngs.ravel()])
    assert decoded.dtype == np.uint8
    assert {int(one.max()) for one in decoded} == {255}
    np.testing.assert_allclose(valued(decoded, scale, 255).reshape(plain.shape), plain, atol=plain.max() / 400)
    mask, none = ask(triton, "attention", "mask", "png", files)
    assert none is None
    whole = wire.infer("attention", images(*files), ["mask"])["mask"]
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(mask[1, 2], np.uint8), cv2.IMREAD_UNCHANGED), whole[1, 2])


def valued(shades: np.ndarray, scale: list, largest: int) -> np.ndarray:
    low, high = np.array(scale).T.reshape(2, -1, 1, 1)
    flat = shades.reshape(-1, *shades.shape[-2:]).astype(np.float64)
    return (low + flat / largest * (high - low)).reshape(shades.shape)


@pytest.mark.parametrize("where", ["output", "request"])
def test_json_carries_files_as_base64_and_halves_as_numbers(http: httpx.Client, where: str):
    data = base64.b64encode(encode(".png", WIDE[0])).decode()
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [data]}
    image["parameters"] = {"content_type": "base64"}

    def depth(form):
        asked = {"outputs": [{"name": "depth", "parameters": {"format": form}}]}
        if where == "request":
            asked = {"outputs": [{"name": "depth"}], "parameters": {"depth.format": form}}
        return http.post("/v2/models/depth/infer", json={"inputs": [image]} | asked).json()["outputs"][0]

    file = depth("PNG")
    assert (file["datatype"], file["parameters"]["content_type"]) == ("BYTES", "base64")
    assert cv2.imdecode(np.frombuffer(base64.b64decode(file["data"][0]), np.uint8), cv2.IMREAD_UNCHANGED).shape == (
        48,
        48,
    )
    half = depth("fp16")
    assert half["datatype"] == "FP16"
    assert np.array(half["data"]).size == 48 * 48


def test_a_format_that_an_output_has_not_is_refused(triton):
    files = [encode(".png", WIDE[0])]
    for output, form in (("embedding", "png"), ("embedding", "jpeg"), ("embedding", "")):
        if form:
            with pytest.raises(InferenceServerException, match="it has fp16"):
                ask(triton, "embedding", output, form, files)
    half, _ = ask(triton, "embedding", "embedding", "fp16", files)
    assert half.dtype == np.float16


def test_a_request_parameter_chooses_for_clients_that_cannot_say_it_of_an_output(wire):
    files = images(encode(".png", WIDE[0]))
    plain = wire.infer("depth", files)["depth"]
    half = wire.infer("depth", files, parameters={"depth.format": "fp16"})["depth"]
    np.testing.assert_array_equal(np.asarray(half, np.float16), plain.astype(np.float16))
    with pytest.raises(Refused, match="an output that is asked for"):
        wire.infer("depth", files, parameters={"mask.format": "png"})


def test_the_configuration_tells_of_formats_and_shades(http: httpx.Client):
    parameters = http.get("/v2/models/attention/config").json()["parameters"]
    assert parameters["attention.formats"]["string_value"] == "fp16, uint8, png"
    assert "UINT8" in parameters["image.also"]["string_value"]


def test_what_does_not_fit_a_format_is_refused_and_a_flat_map_has_a_scale():
    depth = TensorSpec("depth", "FP32", (-1, -1, -1), formats=("fp16", "uint8", "png"))
    with pytest.raises(InputError, match="beyond FP16"):
        formatted(depth, np.full((1, 2, 2), 1e6, np.float32), "fp16")
    flat = formatted(depth, np.full((2, 2, 2), 3.5, np.float32), "uint8")
    assert flat.scale == "[[3.5,3.5],[3.5,3.5]]"
    assert not flat.array.any()
    classes = TensorSpec("classes", "INT32", (-1, -1, -1), formats=("uint8", "png"))
    many = np.array([[[0, 300]]], np.int32)
    with pytest.raises(InputError, match="class 300"):
        formatted(classes, many, "uint8")
    (file,) = formatted(classes, many, "png").array
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED), many[0])
    assert formatted(classes, many % 256, "uint8").array.dtype == np.uint8
    with pytest.raises(InputError, match="it has none but its own"):
        check_format(TensorSpec("ids", "BYTES", (-1, -1)), "png")
