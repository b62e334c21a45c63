"""This server on a network that computes nothing: what is left is the server's own cost.

Flags are those of `python -m server`, and `--reads`: the rows of a batch are put side by side and looked through, as for a real network.
"""

import sys
from collections.abc import Callable, Sequence

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


class Reading(Runtime):
    """Zeros, whatever comes; the rows are made ready as every runtime does."""

    def __init__(self) -> None:
        preprocess = Preprocess(size_px=SIDE_PX, resize_px=256, whole_px=SIDE_PX)
        self.manifest = Manifest(architecture={"patch_px": 16}, preprocess=preprocess, weights_sha256="0")
        self.name, self.device, self.outputs = "nothing", "cpu", ("embedding", "patches")

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        return zeros(len(pixels_NCHW), outputs)


class Nothing(Reading):
    """Zeros for the rows as they came, none of which is read: what Triton's model and the other peers' do."""

    def run_rows(self, parts: Sequence[np.ndarray], outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        return zeros(sum(map(len, parts)), outputs)


def zeros(n: int, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The named outputs of n images."""
    shapes = {"embedding": (n, IDENTITY_WIDTH), "patches": (n, 1, IDENTITY_WIDTH)}
    return {name: np.zeros(shapes[name], np.float32) for name in outputs}


def copies_of(network: Runtime) -> Callable[[ServerConfig], Loaded]:
    """As many copies as a real network would have."""
    return lambda _: Loaded((network,) * usable_cores())


if __name__ == "__main__":
    flags = [word for word in sys.argv[1:] if word != "--reads"]
    config = read_settings(flags, {})
    configure_logs(config.log_level)
    main(config, copies_of(Reading() if "--reads" in sys.argv else Nothing()))
