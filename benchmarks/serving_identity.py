"""This server on a network that computes nothing: what is left is the server's own cost. Flags are those of `python -m server`."""

import sys
from collections.abc import Sequence

import numpy as np

from backbones.checkpoints import Manifest
from benchmarks.serving_targets import IDENTITY_WIDTH, SIDE_PX
from data.preprocess import Preprocess
from runtimes.runtime import Runtime
from server.artifacts import Loaded
from server.config import ServerConfig
from server.cores import usable_cores
from server.logs import configure_logs
from server.run import main
from server.settings import read_settings


class Nothing(Runtime):
    """Zeros, whatever comes."""

    def __init__(self) -> None:
        preprocess = Preprocess(size_px=SIDE_PX, resize_px=256, whole_px=SIDE_PX)
        self.manifest = Manifest(architecture={"patch_px": 16}, preprocess=preprocess, weights_sha256="0")
        self.name, self.device, self.outputs = "nothing", "cpu", ("embedding", "patches")

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        n = len(pixels_NCHW)
        shapes = {"embedding": (n, IDENTITY_WIDTH), "patches": (n, 1, IDENTITY_WIDTH)}
        return {name: np.zeros(shapes[name], np.float32) for name in outputs}


def load(_: ServerConfig) -> Loaded:
    """As many copies as a real network would have."""
    return Loaded((Nothing(),) * usable_cores())


if __name__ == "__main__":
    config = read_settings(sys.argv[1:], {})
    configure_logs(config.log_level)
    main(config, load)
