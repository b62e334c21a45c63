"""What KServe v2 clients rely on around inference: health, metadata, configuration, index, statistics, compression, ids."""

import asyncio
import base64
import gzip
import json
import queue

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from backbones.checkpoints import Manifest
from server.run import Running
from tests.server.conftest import config_of
from tests.server.images import png
from tests.server.wires import Refused, images, open_wire

MODELS = {
    "backbone": ({"pixels": ("FP32", [-1, 3, -1, -1])}, {"embedding": [-1, 48], "patches": [-1, -1, 48]}),
    "embedding": ({"image": ("BYTES", [-1])}, {"embedding": [-1, 48]}),
    "attention": ({"image": ("BYTES", [-1])}, {"attention": [-1, 3, -1, -1], "mask": [-1, 3, -1, -1]}),
    "knn": ({"image": ("BYTES", [-1]), "embedding": ("FP32", [-1, 48])}, {"ids": [-1, -1], "scores": [-1, -1]}),
    "depth": ({"image": ("BYTES", [-1])}, {"depth": [-1, -1, -1]}),
    "overview": (
        {"image": ("BYTES", [-1])},
        {"embedding": [-1, 48], "attention": [-1, 3, -1, -1], "mask": [-1, 3, -1, -1], "depth": [-1, -1, -1]},
    ),
}


@pytest.fixture(params=["grpc", "http"])
def client(server, request):
    """Both of tritonclient's clients; what they return is read as JSON."""
    opened = open_wire(request.param, server.addresses)
    yield opened.client
    opened.close()


def as_json(client, call, *args):
    method = getattr(client, call)
    return method(*args, as_json=True) if isinstance(client, grpc_client.InferenceServerClient) else method(*args)


def test_a_running_server_is_live_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert all(client.is_model_ready(name) and client.is_model_ready(name, "1") for name in MODELS)


def test_health_over_http_has_the_bodies_that_kserves_own_client_reads(http):
    """Open Inference Protocol: it takes `live` and `ready` from the JSON, and fails where there is none."""
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    for tail in ("", "/versions/1"):
        assert http.get(f"/v2/models/depth{tail}/ready").json() == {"name": "depth", "ready": True}


@pytest.mark.parametrize(("name", "version"), [("nothing", ""), ("embedding", "7")])
def test_what_is_not_served_is_not_ready(client, name, version):
    assert not client.is_model_ready(name, version)


@pytest.mark.parametrize("name", MODELS)
def test_metadata_names_tensors_types_and_shapes(client, name):
    found = as_json(client, "get_model_metadata", name)
    inputs, outputs = MODELS[name]
    shapes = {one["name"]: [int(size) for size in one["shape"]] for one in found["outputs"]}
    assert found["versions"] == ["1"]
    assert {one["name"]: (one["datatype"], [int(n) for n in one["shape"]]) for one in found["inputs"]} == inputs
    assert outputs.items() <= shapes.items()


def test_configuration_carries_the_manifest_and_the_unit_of_depth(client, runtime):
    config = as_json(client, "get_model_config", "depth")
    parameters = config.get("config", config)["parameters"]
    assert Manifest.from_json(json.loads(parameters["manifest"]["string_value"])) == runtime.manifest
    assert parameters["unit"]["string_value"] == "furlong"


def test_index_lists_every_model_as_ready(client):
    index = as_json(client, "get_model_repository_index")
    listed = index["models"] if isinstance(index, dict) else index
    assert {one["name"]: (one["version"], one["state"]) for one in listed} == dict.fromkeys(MODELS, ("1", "READY"))


def test_metadata_names_the_server_and_its_extensions(client):
    found = as_json(client, "get_server_metadata")
    assert found["name"] == "dinoscope"
    assert {"binary_tensor_data", "statistics", "model_configuration"} <= set(found["extensions"])


def test_statistics_count_requests_rows_and_failures(client, server):
    def counts():
        one = as_json(client, "get_inference_statistics", "depth")["model_stats"][0]
        stages = one["inference_stats"]
        return np.array(
            [
                int(one.get("inference_count", 0)),
                int(stages["success"].get("count", 0)),
                int(stages["fail"].get("count", 0)),
                int(stages["compute_infer"].get("ns", 0)) > 0,
            ]
        )

    wire = open_wire("grpc", server.addresses)
    wire.infer("depth", images(png(0)))
    before = counts()
    wire.infer("depth", images(png(0), png(1), png(2)))
    with pytest.raises(Refused, match="parameter 'size' 7 does not fit"):
        wire.infer("depth", images(png(0)), parameters={"size": 7})
    wire.close()
    assert (counts() - before).tolist() == [3, 1, 1, 0]
    assert counts()[3] == 1


def test_statistics_of_all_models_come_without_a_name(client):
    found = as_json(client, "get_inference_statistics")
    assert {one["name"] for one in found["model_stats"]} == set(MODELS)


def test_outputs_come_in_the_order_that_was_asked_for(server):
    for name, module in (("grpc", grpc_client), ("http", http_client)):
        opened = open_wire(name, server.addresses)
        tensor = module.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(images(png(0))["image"])
        wanted = [module.InferRequestedOutput(one) for one in ("scores", "ids")]
        reply = opened.client.infer("knn", [tensor], outputs=wanted, request_id="my-id", model_version="1")
        answer = reply.get_response(as_json=True) if name == "grpc" else reply.get_response()
        assert [one["name"] for one in answer["outputs"]] == ["scores", "ids"]
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("my-id", "knn", "1")
        opened.close()


def test_compressed_requests_and_replies_say_the_same(server):
    plain = {}
    for name, module in (("grpc", grpc_client), ("http", http_client)):
        opened = open_wire(name, server.addresses)
        plain[name] = opened.infer("attention", images(png(0)))["attention"]
        for coding in ("gzip", "deflate"):
            how = (
                {"compression_algorithm": coding}
                if name == "grpc"
                else {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
            )
            tensor = module.InferInput("image", [1], "BYTES")
            tensor.set_data_from_numpy(images(png(0))["image"])
            got = opened.client.infer("attention", [tensor], **how).as_numpy("attention")
            np.testing.assert_array_equal(got, plain[name])
        opened.close()


def test_images_may_come_as_typed_contents(server):
    """As clients that know only the protocol's messages send them, without tritonclient's length prefixes."""
    wanted = open_wire("grpc", server.addresses).infer("embedding", images(png(0), png(1)))["embedding"]
    request = service_pb2.ModelInferRequest(model_name="embedding")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([png(0), png(1)])
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    found = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
    np.testing.assert_array_equal(found, wanted)


def test_typed_contents_are_read_like_raw_ones(server, runtime):
    """Some clients, among them those made from the protocol file by hand, send values in protobuf's own lists."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 16), dtype=np.float32)
    request = service_pb2.ModelInferRequest(model_name="backbone")
    tensor = request.inputs.add(name="pixels", datatype="FP32", shape=pixels.shape)
    tensor.contents.fp32_contents.extend(pixels.ravel().tolist())
    request.outputs.add(name="embedding")
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        reply = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    got = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(reply.outputs[0].shape)
    np.testing.assert_allclose(got, runtime.run(pixels)["embedding"], atol=1e-5)


def test_the_async_client_gets_many_answers_at_once(server, runtime):
    wire = open_wire("grpc", server.addresses)
    alone = [wire.infer("embedding", images(png(seed)))["embedding"] for seed in range(8)]
    wire.close()

    async def ask():
        async with grpc_aio.InferenceServerClient(server.addresses.grpc) as client:

            async def one(seed):
                tensor = grpc_aio.InferInput("image", [1], "BYTES")
                tensor.set_data_from_numpy(images(png(seed))["image"])
                return (await client.infer("embedding", [tensor])).as_numpy("embedding")

            return await asyncio.gather(*map(one, range(8)))

    np.testing.assert_allclose(np.stack(asyncio.run(ask())), np.stack(alone), atol=1e-5)


def test_the_standard_health_service_says_serving(server):
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            assert (
                stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
            )


def test_what_is_not_offered_says_so(server):
    """Every RPC of the protocol is either answered or UNIMPLEMENTED."""
    offered = {
        *(
            "ServerLive",
            "ServerReady",
            "ModelReady",
            "ServerMetadata",
            "ModelMetadata",
            "ModelInfer",
            "ModelStreamInfer",
        ),
        *("ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
        *(f"SystemSharedMemory{one}" for one in ("Status", "Register", "Unregister")),
    }
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    others = [method for method in service.methods if method.name not in offered]
    assert len(others) + len(offered) == len(service.methods)
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for method in others:
            with pytest.raises(grpc.RpcError) as refused:
                getattr(stub, method.name)(getattr(service_pb2, method.input_type.name)())
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert method.name in refused.value.details()


def test_a_stream_answers_in_order_and_survives_a_bad_request(server):
    replies: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.addresses.grpc) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        for number in range(30):
            file = b"no image" if number == 7 else png(number % 3, height=20 + 30 * (number % 4))
            tensor = grpc_client.InferInput("image", [1], "BYTES")
            tensor.set_data_from_numpy(np.array([file], dtype=object))
            client.async_stream_infer("embedding", [tensor], request_id=str(number))
        found = [replies.get(timeout=60) for _ in range(30)]
        client.stop_stream()
    assert "image[0]" in str(found.pop(7)[1])
    assert [error for _, error in found] == [None] * 29
    ids = [result.get_response().id for result, _ in found]
    assert ids == [str(number) for number in range(30) if number != 7]
    assert all(result.get_response().parameters["triton_final_response"].bool_param for result, _ in found)
    assert all(result.as_numpy("embedding").shape == (1, 48) for result, _ in found)


def test_bytes_that_are_no_message_end_neither_stream_nor_server(server):
    def sent():
        yield b"\xff\xff\xff"
        yield service_pb2.ModelInferRequest(model_name="nothing", id="mine").SerializeToString()

    with grpc.insecure_channel(server.addresses.grpc) as channel:
        call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=None,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        first, second = call(sent(), timeout=30)
    assert "are not a ModelStreamInfer message" in first.error_message
    assert "model 'nothing' is not served" in second.error_message
    assert second.infer_response.id == "mine"


@pytest.mark.parametrize("page", ["metrics port", "http port"])
def test_metrics_are_a_page_that_prometheus_can_read(server, http, page):
    http.post("/v1/embeddings", files={"file": png(0)}).raise_for_status()
    url = server.addresses.metrics if page == "metrics port" else f"{server.addresses.http}/metrics"
    families = {family.name: family for family in text_string_to_metric_families(httpx.get(url).text)}
    success = {one.labels["model"]: one.value for one in families["nv_inference_request_success"].samples}
    assert set(success) == set(MODELS)
    assert success["embedding"] >= 1
    assert families["dinoscope_queue_rows"].samples[0].value == 0
    assert {"dinoscope_request_seconds", "dinoscope_batch_rows", "nv_inference_exec_count"} <= set(families)
    assert {"dinoscope_decode_seconds", "dinoscope_queue_seconds", "dinoscope_event_loop_lag_seconds"} <= set(families)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_gzipped_json_request_is_read_of_however_many_members(http, members):
    body = {"inputs": [{"name": "embedding", "datatype": "FP32", "shape": [1, 48], "data": [1.0] * 48}]}
    text = json.dumps(body).encode()
    step = -(-len(text) // members)
    packed = b"".join(gzip.compress(text[start : start + step]) for start in range(0, len(text), step))
    answer = http.post("/v2/models/knn/infer", content=packed, headers={"content-encoding": "gzip"})
    assert answer.status_code == 200
    assert answer.json()["outputs"][0]["shape"] == [1, 5]


def test_what_is_null_in_a_json_request_is_as_if_it_were_not_there(http):
    """As programs send it that make their requests of a schema, such as MLServer's and KServe's types."""
    none = {"content_type": None, "shared_memory_region": None, "format": None}
    tensor = {"name": "embedding", "datatype": "FP32", "shape": [1, 48], "data": [1.0] * 48, "parameters": None}
    bare = {"id": None, "parameters": None, "outputs": None, "inputs": [tensor]}
    outputs = [{"name": "ids", "parameters": None}, {"name": "scores", "parameters": none}]
    full = {"id": "a", "parameters": {"k": None}, "outputs": outputs, "inputs": [tensor | {"parameters": none}]}
    for body, names in ((bare, ["ids", "labels", "scores"]), (full, ["ids", "scores"])):
        answer = http.post("/v2/models/knn/infer", json=body)
        assert answer.status_code == 200, answer.text
        assert [one["name"] for one in answer.json()["outputs"]] == names
        assert answer.json().get("id") == body["id"]
    assert "id" not in http.post("/v2/models/knn/infer", json=bare).json()
    assert http.post("/v2/repository/index", json={"ready": None}).status_code == 200


def test_what_mlservers_own_codecs_say_of_a_request_is_no_parameter_of_a_model(http):
    said = {"parameters": {"content_type": "np"}}
    tensor = {"name": "embedding", "datatype": "FP32", "shape": [1, 48], "data": [1.0] * 48, **said}
    assert http.post("/v2/models/knn/infer", json={"inputs": [tensor], **said}).status_code == 200
    file = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [base64.b64encode(png(0)).decode()]}
    file |= {"parameters": {"content_type": "base64"}}
    assert http.post("/v2/models/embedding/infer", json={"inputs": [file], **said}).status_code == 200
    text = file | {"data": ["no image"], "parameters": {"content_type": "str"}}
    told = http.post("/v2/models/embedding/infer", json={"inputs": [text]}).json()["error"]
    assert told.startswith("image[0]: these bytes are no image")


def test_a_question_for_the_index_that_is_no_truth_is_refused(http):
    answer = http.post("/v2/repository/index", json={"ready": "false"})
    assert (answer.status_code, answer.json()["error"]) == (400, "'ready' is 'false'; wanted true or false")


def test_a_body_without_a_json_header_is_the_only_input_of_its_model(http):
    """Triton's raw binary request: an image file as it is, the answer in binary."""
    raw = {"inference-header-content-length": "0"}
    answer = http.post("/v2/models/embedding/infer", content=png(3), headers=raw)
    assert answer.status_code == 200
    length = int(answer.headers["inference-header-content-length"])
    (told,) = json.loads(answer.content[:length])["outputs"]
    body = {
        "inputs": [
            {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 4 + len(png(3))}}
        ]
    }
    header = json.dumps(body).encode()
    usual = http.post(
        "/v2/models/embedding/infer",
        content=header + len(png(3)).to_bytes(4, "little") + png(3),
        headers={"inference-header-content-length": str(len(header))},
    ).json()
    assert told["shape"] == [1, 48]
    np.testing.assert_array_equal(
        np.frombuffer(answer.content[length:], "<f4"), np.float32(usual["outputs"][0]["data"])
    )


@pytest.mark.parametrize(
    ("model", "body", "told"),
    [
        ("knn", png(0), "models with one input of BYTES; 'knn' has image (BYTES), embedding (FP32)"),
        ("backbone", bytes(64), "'backbone' has pixels (FP32)"),
        ("embedding", b"", "came empty"),
        ("embedding", b"no image", "image[0]"),
    ],
)
def test_a_body_without_a_json_header_is_refused_where_it_cannot_be_an_input(http, model, body, told):
    answer = http.post(f"/v2/models/{model}/infer", content=body, headers={"inference-header-content-length": "0"})
    assert answer.status_code == 400
    assert told in answer.json()["error"]


def test_a_reply_that_is_too_large_is_an_error_of_its_request_alone(network, tmp_path):
    """It would end a whole stream if gRPC were left to refuse it, and be counted as a success."""

    def counted(client):
        found = client.get_inference_statistics("depth", as_json=True)["model_stats"][0]["inference_stats"]
        return [int(found[one].get("count", 0)) for one in ("success", "fail")]

    few, many = images(png(0)), images(*[png(n) for n in range(20)])
    replies = queue.Queue()
    with (
        Running(config_of(network, tmp_path, max_message_mb=1)) as running,
        grpc_client.InferenceServerClient(running.addresses.grpc) as client,
    ):
        client.start_stream(lambda result, error: replies.put((result, error)))
        for sent in (few, many, few):
            tensor = grpc_client.InferInput("image", list(sent["image"].shape), "BYTES")
            tensor.set_data_from_numpy(sent["image"])
            client.async_stream_infer("depth", [tensor], parameters={"size": 128})
        client.stop_stream()
        answers = [replies.get(timeout=60) for _ in range(3)]
        assert counted(client) == [2, 1]
    assert [error is None for _, error in answers] == [True, False, True]
    assert "the reply has 1.2 MB of outputs, and 1 MB are allowed" in str(answers[1][1])
