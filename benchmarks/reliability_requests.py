"""Requests of all kinds with the answers that they must get, and hostile ones with the answers that they may get.

Read in this order: Answers (what is right), Clients (who asks): good requests, then hostile ones.
"""

import http.client
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from backbones.checkpoints import Manifest, save_backbone
from backbones.heads import DepthHead, DepthHeadSpec, HeadManifest, save_head
from backbones.vit import ViT, ViTSpec
from benchmarks.reliability_messages import image_request, random_message, tensor_request
from data.decode import decode_image
from data.preprocess import Preprocess, center_view, whole_view
from runtimes.onnx_runtime import OnnxRuntime

TIMEOUT_S = 60.0
"""A request that takes longer hangs."""
CLOSE = 1e-3
"""How far an answer may be from the right one, of its largest value: the network is computed in batches that differ."""
FAIR_CODES = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "FAILED_PRECONDITION",
    "DEADLINE_EXCEEDED",
}
"""What hostile requests may be told over gRPC; over HTTP any status below 500, or 504."""
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"


def save_network(folder: Path) -> None:
    """A tiny backbone with a depth head that fits it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = ViT(ViTSpec(patch_px=8, width=48, depth=2, heads=3, img_px=32))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    preprocess = Preprocess(size_px=32, resize_px=40, whole_px=48)
    ckpt = folder / "backbone.safetensors"
    written = save_backbone(ckpt, model, Manifest(architecture={}, preprocess=preprocess, source="random"))
    manifest = HeadManifest(kind="depth", backbone_sha256=written.weights_sha256, spec={})
    save_head(folder / "depth.safetensors", DepthHead(DepthHeadSpec(width_in=96, bins=16, unit="m")), manifest)


class Answers:
    """A few images and tensors, and what the network says of them with no server around it."""

    def __init__(self, models: Path) -> None:
        rng = np.random.default_rng(0)
        shades = [cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64 + 8 * n, 56)) for n in range(8)]
        self.images = [cv2.imencode(".jpg" if n % 2 else ".png", one)[1].tobytes() for n, one in enumerate(shades)]
        self.pixels = rng.standard_normal((8, 3, 32, 32), dtype=np.float32)
        with OnnxRuntime(models / "backbone.onnx", device="cpu", threads=1) as runtime:
            preprocess = runtime.manifest.preprocess
            decoded = [decode_image(one) for one in self.images]
            center = np.stack([center_view(one, preprocess) for one in decoded])
            whole = np.stack([whole_view(one, preprocess) for one in decoded])
            self.right = {"embedding": runtime.run(center)["embedding"]}
            self.right |= runtime.run(whole, ("attention", "depth"))
            self.tensors = runtime.run(self.pixels, ("embedding", "attention"))


class Clients:
    """One thread's requests, good and hostile, at random; what was wrong with an answer is a line in `wrong`."""

    def __init__(self, at: dict[str, str], answers: Answers, seed: int, hostile: float = 0.05) -> None:
        self._rng, self._answers, self._hostile = random.Random(seed), answers, hostile
        self._address = at["http"].removeprefix("http://")
        self._http = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        self._channel = grpc.insecure_channel(at["grpc"], options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._raw = self._channel.unary_unary(MODEL_INFER)
        self._name = f"c{seed}"
        self.wrong: list[str] = []
        self.answered = 0

    def run(self, n: int) -> Counter[str]:
        """So many requests; how many there were of each kind."""
        counts: Counter[str] = Counter()
        while counts.total() < n:
            hostile = self._rng.random() < self._hostile
            kind = self._rng.choice(HOSTILE if hostile else GOOD)
            counts[f"{'hostile' if hostile else 'good'}: {kind.__name__.strip('_')}"] += REQUESTS.get(kind, 1)
            self._ask(kind)
        return counts

    def models(self, n: int) -> None:
        """Requests to models only."""
        for _ in range(n):
            self._ask(self._rng.choice(MODELS))

    def _ask(self, kind: Callable[["Clients"], None]) -> None:
        try:
            kind(self)
            self.answered += 1
        except Exception as error:
            self._http.close()
            self.wrong.append(f"{kind.__name__}: {type(error).__name__} {' '.join(str(error).split())[:300]}")

    def until_refused(self) -> Counter[str]:
        """Ask models until the server takes no more."""
        self.answered = 0
        while True:
            try:
                self._rng.choice(MODELS)(self)
                self.answered += 1
            except (grpc.RpcError, OSError, http.client.HTTPException, Refused) as error:
                # gRPC itself cancels a call that meets a listener on its way down; the server never saw it.
                refused = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                if isinstance(error, grpc.RpcError) and error.code() not in refused:
                    self.wrong.append(str(error.code()))
                return Counter(answered=self.answered, refused=1)

    def cancel_storm(self, n: int) -> None:
        """Calls that are taken back at once or a moment later."""
        calls = []
        for _ in range(n):
            call = self._stub.ModelInfer.future(tensor_request(self._answers.pixels[:4]), timeout=TIMEOUT_S)
            calls.append(call)
            timer = threading.Timer(self._rng.random() * 0.05, call.cancel)
            timer.start()
            if len(calls) % 50 == 0:
                timer.join()
        for call in calls:
            call.cancel()

    def _number(self) -> int:
        return self._rng.randrange(8)

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        self._http.request("POST", path, body, headers)
        reply = self._http.getresponse()
        return reply.status, reply.read()

    def _json(self, path: str, body: bytes, kind: str, status: int = 200) -> Any:
        found, text = self._post(path, body, {"Content-Type": kind})
        if found == 503:
            raise Refused(text)
        if found != status:
            raise ValueError(f"{path}: {found} {text[:200]!r}")
        return json.loads(text)

    def _close_to(self, found: Any, right: np.ndarray) -> None:
        found = np.asarray(found, np.float32).reshape(right.shape)
        apart = float(np.abs(found - right).max() / np.abs(right).max())
        if not apart < CLOSE:
            raise ValueError(f"the answer is off by {apart:.1e}")

    def _backbone_grpc(self) -> None:
        start = self._number()
        reply = self._stub.ModelInfer(tensor_request(self._answers.pixels[start : start + 3]), timeout=TIMEOUT_S)
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
            self._close_to(np.frombuffer(raw, np.float32), self._answers.tensors[output.name][start : start + 3])

    def _image_grpc(self) -> None:
        n, model = self._number(), self._rng.choice(["embedding", "attention", "depth"])
        request = image_request(model, self._answers.images[n])
        request.outputs.add(name=model)
        reply = self._stub.ModelInfer(request, timeout=TIMEOUT_S)
        self._close_to(np.frombuffer(reply.raw_output_contents[0], np.float32), self._answers.right[model][n])

    def _about_grpc(self) -> None:
        stub = self._stub
        asked: list[Callable[[], Any]] = [
            lambda: stub.ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT_S).live,
            lambda: stub.ServerReady(pb.ServerReadyRequest(), timeout=TIMEOUT_S).ready,
            lambda: stub.ModelReady(pb.ModelReadyRequest(name="depth"), timeout=TIMEOUT_S).ready,
            lambda: stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=TIMEOUT_S).name,
            lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name="knn"), timeout=TIMEOUT_S).inputs,
            lambda: stub.ModelConfig(pb.ModelConfigRequest(name="backbone"), timeout=TIMEOUT_S).config.name,
            lambda: stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=TIMEOUT_S).model_stats,
            lambda: stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=TIMEOUT_S).models,
            lambda: (
                health_pb2_grpc.HealthStub(self._channel)
                .Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
                .status
            ),
        ]
        if not self._rng.choice(asked)():
            raise ValueError("an empty answer")

    def _backbone_json(self) -> None:
        n = self._number()
        tensor = {
            "name": "pixels",
            "datatype": "FP32",
            "shape": [1, 3, 32, 32],
            "data": self._answers.pixels[n].ravel().tolist(),
        }
        body = {"inputs": [tensor], "outputs": [{"name": "embedding"}]}
        reply = self._json("/v2/models/backbone/infer", json.dumps(body).encode(), "application/json")
        self._close_to(reply["outputs"][0]["data"], self._answers.tensors["embedding"][n])

    def _backbone_binary(self) -> None:
        n, raw = self._number(), self._answers.pixels.nbytes // 8
        tensor = {
            "name": "pixels",
            "datatype": "FP32",
            "shape": [1, 3, 32, 32],
            "parameters": {"binary_data_size": raw},
        }
        outputs = [{"name": "embedding", "parameters": {"binary_data": True}}]
        header = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
        body = header + self._answers.pixels[n].tobytes()
        status, reply = self._post(
            "/v2/models/backbone/infer", body, {"Inference-Header-Content-Length": str(len(header))}
        )
        if status == 503:
            raise Refused(reply)
        if status != 200:
            raise ValueError(f"{status} {reply[:200]!r}")
        self._close_to(np.frombuffer(reply[-48 * 4 :], np.float32), self._answers.tensors["embedding"][n])

    def _image_rest(self) -> None:
        n, model = self._number(), self._rng.choice(["embedding", "attention", "depth"])
        path = "/v1/embeddings" if model == "embedding" else f"/v1/{model}"
        reply = self._json(path, self._answers.images[n], "image/*")
        self._close_to(reply["items"][0][model], self._answers.right[model][n])

    def _picture_rest(self) -> None:
        path = self._rng.choice(["/v1/attention?format=png", "/v1/depth?format=png"])
        status, reply = self._post(path, self._answers.images[self._number()], {"Content-Type": "image/png"})
        if status != 200 or not reply.startswith(b"\x89PNG"):
            raise ValueError(f"{status} {reply[:100]!r}")

    def _about_rest(self) -> None:
        paths = ["/docs", "/openapi.json", "/metrics", "/v1/collections", "/v1/evaluations", "/v2", "/v2/models/stats"]
        paths += [
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/depth",
            "/v2/models/knn/config",
            "/v2/models/knn/ready",
        ]
        path = self._rng.choice(paths)
        self._http.request("GET", path)
        reply = self._http.getresponse()
        reply.read()
        if reply.status != 200:
            raise ValueError(f"{path}: {reply.status}")

    def _collection_rest(self) -> None:
        """An item added is found as its own nearest, and gone once deleted."""
        n = self._number()
        path, vector = f"/v1/collections/{self._name}", self._answers.right["embedding"][n].tolist()
        items = {"items": [{"id": "it", "label": f"l{n}", "embedding": vector}]}
        self._json(f"{path}/items", json.dumps(items).encode(), "application/json", 201)
        found = self._json(f"{path}/search?k=1", self._answers.images[n], "image/*")["results"][0]["neighbours"][0]
        classes = self._json(f"{path}/classify?k=1", self._answers.images[n], "image/*")["results"][0]["classes"]
        if (found["id"], found["score"] > 0.999, classes[0]["label"]) != ("it", True, f"l{n}"):
            raise ValueError(f"{found} {classes}")
        self._http.request("DELETE", f"{path}/items/it")
        reply = self._http.getresponse()
        reply.read()
        if reply.status != 204:
            raise ValueError(f"DELETE: {reply.status}")

    def _fair_grpc(self, data: bytes) -> None:
        try:
            self._raw(data, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code().name not in FAIR_CODES:
                raise ValueError(f"{error.code()} {error.details()} for {data[:60]!r}") from error

    def _fair_http(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        status, reply = self._post(path, body, headers)
        if status >= 500 and status != 504:
            raise ValueError(f"{path}: {status} {reply[:200]!r}")

    def _noise_grpc(self) -> None:
        self._fair_grpc(self._rng.randbytes(self._rng.randrange(200)))

    def _changed_grpc(self) -> None:
        request = self._rng.choice(
            [tensor_request(self._answers.pixels[:1]), image_request("depth", self._answers.images[0])]
        )
        self._fair_grpc(self._changed(request.SerializeToString()))

    def _random_protobuf(self) -> None:
        self._fair_grpc(random_message(pb.ModelInferRequest(), self._rng, 3).SerializeToString())

    def _changed_json(self) -> None:
        tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.5] * 192, "parameters": {}}
        body = self._changed(json.dumps({"id": "x", "inputs": [tensor], "outputs": [{"name": "embedding"}]}).encode())
        headers = {"Content-Type": "application/json"}
        if self._rng.random() < 0.3:
            headers["Inference-Header-Content-Length"] = str(self._rng.randrange(300))
        self._fair_http("/v2/models/backbone/infer", body, headers)

    def _changed_image(self) -> None:
        path = self._rng.choice(
            ["/v1/embeddings", "/v1/attention", "/v1/depth?size=64", f"/v1/collections/{self._name}/search"]
        )
        self._fair_http(path, self._changed(self._answers.images[self._number()]), {"Content-Type": "image/png"})

    def _noise_http(self) -> None:
        host, _, port = self._address.partition(":")
        with socket.create_connection((host, int(port)), TIMEOUT_S) as one:
            one.sendall(
                self._rng.choice([b"", b"POST /v1/depth HTTP/1.1\r\n"]) + self._rng.randbytes(100) + b"\r\n\r\n"
            )
            one.shutdown(socket.SHUT_WR)
            while one.recv(4096):
                pass

    def _changed(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._rng.randrange(1, 6)):
            at = self._rng.randrange(len(changed) or 1)
            how = self._rng.randrange(3)
            if how == 0:
                changed[at : at + 1] = self._rng.randbytes(1)
            elif how == 1:
                del changed[at : at + self._rng.randrange(1, 40)]
            else:
                changed[at:at] = self._rng.randbytes(self._rng.randrange(1, 8))
        return bytes(changed)


class Refused(Exception):
    """The server takes no more requests."""


MODELS = [
    Clients._backbone_grpc,
    Clients._image_grpc,
    Clients._backbone_json,
    Clients._backbone_binary,
    Clients._image_rest,
]
GOOD = [
    *MODELS,
    Clients._backbone_grpc,
    Clients._about_grpc,
    Clients._picture_rest,
    Clients._about_rest,
    Clients._collection_rest,
]
REQUESTS = {Clients._collection_rest: 4}
"""How many requests one call makes, where it is not one."""
HOSTILE = [
    Clients._noise_grpc,
    Clients._changed_grpc,
    Clients._random_protobuf,
    Clients._changed_json,
    Clients._changed_image,
]
HOSTILE.append(Clients._noise_http)
