"""A network that computes only when the test lets it, so that what waits, merges, expires or drains is no matter of luck."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from backbones.checkpoints import Manifest
from data.preprocess import Preprocess
from runtimes.runtime import Runtime
from server.artifacts import Loaded
from server.config import ServerConfig
from server.run import Running
from tests.server.wires import open_wire

ROWS = 8
"""That the server `gated` takes at a time."""


class GatedRuntime(Runtime):
    """`embedding` [N, 3]: the mean of each channel, `patches` [N, 1, 3] the same. Runs wait in front of `gate` while it is closed."""

    def __init__(self) -> None:
        preprocess = Preprocess(size_px=32, resize_px=32, whole_px=32)
        self.manifest = Manifest(
            architecture={"family": "gated", "patch_px": 8}, preprocess=preprocess, weights_sha256="g"
        )
        self.name, self.device, self.outputs = "gated", "cpu", ("embedding", "patches")
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.fails = False

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.batches.append(len(pixels_NCHW))
        assert self.gate.wait(60)
        if self.fails:
            raise RuntimeError("secret of the engine")
        means_N3 = pixels_NCHW.mean(axis=(2, 3)).astype(np.float32)
        return {name: means_N3 if name == "embedding" else means_N3[:, None] for name in outputs}

    def load(self, _: ServerConfig) -> Loaded:
        """As `load_artifacts`."""
        return Loaded((self,))


class Held:
    """A part of the server that does not go on before the test lets it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._work = work

    def __call__(self, *args: Any) -> Any:
        self.begun.set()
        assert self.go.wait(60)
        return self._work(*args)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once it holds; fail when it does not within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pixels(seed: int, rows: int = 1, side: int = 8) -> np.ndarray:
    """Images that the network says something of each."""
    return np.random.default_rng(seed).standard_normal((rows, 3, side, side), dtype=np.float32)


def one_image() -> Any:
    """An image of 8 px as a message of gRPC."""
    request = service_pb2.ModelInferRequest(model_name="backbone")
    request.inputs.add(name="pixels", datatype="FP32", shape=[1, 3, 8, 8])
    request.raw_input_contents.append(pixels(1).tobytes())
    return request


def ask(
    running: Running,
    seed: int,
    rows: int = 1,
    side: int = 8,
    name: str = "grpc",
    parameters: dict[str, Any] | None = None,
) -> float:
    """One request of its own client; returns how far the answer is from the truth."""
    wire = open_wire(name, running.addresses)
    try:
        sent = pixels(seed, rows, side)
        got = wire.infer("backbone", {"pixels": sent}, parameters=parameters)["embedding"]
        return float(np.abs(got - sent.mean(axis=(2, 3))).max())
    finally:
        wire.close()


def gauge(running: Running, name: str) -> float:
    """A number of the metrics page."""
    families = text_string_to_metric_families(httpx.get(running.addresses.metrics).text)
    return next(family.samples[0].value for family in families if family.name == name)
