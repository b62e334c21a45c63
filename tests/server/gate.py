"""A network that computes only when the test lets it, so that what waits, merges, expires or drains is no matter of luck."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from backbones.checkpoints import Manifest
from data.preprocess import Preprocess
from runtimes.runtime import Runtime
from server.artifacts import Loaded
from server.config import ServerConfig


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


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once it holds; fail when it does not within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
