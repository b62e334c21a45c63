"""The smallest KServe v2 servers that can serve `backbone`, one a wire, so that the remote runtime is tested by itself."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from runtimes.runtime import Runtime


class Served:
    """What both servers serve. Tests change its fields to misbehave."""

    def __init__(self, runtime: Runtime, max_batch_size: int = 0) -> None:
        self.runtime, self.max_batch_size = runtime, max_batch_size
        self.manifest = json.dumps(runtime.manifest.to_json())
        self.batches: list[int] = []
        self.refusal = ""
        self.rows_lost = 0

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the outputs as metadata gives them, -1 where they vary."""
        side = self.runtime.manifest.preprocess.size_px
        made = self.runtime.run(np.zeros((1, 3, side, side), np.float32), self.runtime.outputs)
        fixed = {"embedding": (1,), "patches": (2,), "attention": (1,), "depth": ()}
        return {n: [s if k in fixed[n] else -1 for k, s in enumerate(a.shape)] for n, a in made.items()}

    def run(self, pixels: np.ndarray, outputs: list[str]) -> dict[str, np.ndarray]:
        """One request."""
        self.batches.append(len(pixels))
        made = self.runtime.run(pixels, outputs)
        return {name: array[: len(array) - self.rows_lost] for name, array in made.items()}


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, served: Served) -> None:
        self.served = served

    def ModelConfig(self, request: Any, context: Any) -> Any:
        reply = service_pb2.ModelConfigResponse()
        reply.config.max_batch_size = self.served.max_batch_size
        if self.served.manifest:
            reply.config.parameters["manifest"].string_value = self.served.manifest
        return reply

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        reply = service_pb2.ModelMetadataResponse(name="backbone")
        for name, shape in self.served.shapes().items():
            reply.outputs.add(name=name, datatype="FP32", shape=shape)
        return reply

    def ModelInfer(self, request: Any, context: Any) -> Any:
        if self.served.refusal:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self.served.refusal)
        (tensor,) = request.inputs
        pixels = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tuple(tensor.shape))
        reply = service_pb2.ModelInferResponse(model_name="backbone")
        for name, array in self.served.run(pixels, [output.name for output in request.outputs]).items():
            reply.outputs.add(name=name, datatype="FP32", shape=array.shape)
            reply.raw_output_contents.append(array.tobytes())
        return reply


@contextmanager
def grpc_server(served: Served) -> Iterator[str]:
    """Its address, grpc://host:port."""
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(served), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def http_server(served: Served) -> Iterator[str]:
    """Its address, http://host:port."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep quiet."""

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v2/models/backbone/config":
                parameters = {"manifest": {"string_value": served.manifest}} if served.manifest else {}
                self.answer(200, {"max_batch_size": served.max_batch_size, "parameters": parameters})
            elif self.path == "/v2/models/backbone":
                outputs = [{"name": n, "datatype": "FP32", "shape": s} for n, s in served.shapes().items()]
                self.answer(200, {"name": "backbone", "outputs": outputs})
            else:
                self.answer(404, {"error": "unknown"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if served.refusal:
                self.answer(429, {"error": served.refusal})
                return
            split = int(self.headers["Inference-Header-Content-Length"])
            request = json.loads(body[:split])
            pixels = np.frombuffer(body[split:], np.float32).reshape(request["inputs"][0]["shape"])
            made = served.run(pixels, [output["name"] for output in request["outputs"]])
            outputs = [
                {"name": n, "datatype": "FP32", "shape": a.shape, "data": a.ravel().tolist()} for n, a in made.items()
            ]
            self.answer(200, {"model_name": "backbone", "outputs": outputs})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


SERVERS = {"grpc": grpc_server, "http": http_server}
