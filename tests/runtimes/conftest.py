"""One small network on every engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backbones.checkpoints import load_backbone
from backbones.heads import load_depth_head
from backbones.network import Network
from runtimes.open import open_runtime
from runtimes.runtime import Runtime
from tests.exports.artifacts import Artifact, artifact, save_network
from tests.runtimes.fake_servers import SERVERS, Served


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone and its depth head; the same weights as `exported`, without the wait for an export."""
    return save_network("v1", tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="session")
def exported() -> Artifact:
    """The same network as one .onnx with depth."""
    return artifact("v1")


@pytest.fixture(scope="session")
def network(checkpoint: tuple[Path, Path]) -> Network:
    """The network itself."""
    backbone = load_backbone(checkpoint[0])
    head, _ = load_depth_head(checkpoint[1], backbone.manifest.weights_sha256)
    return Network(backbone.model, head).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def torch_runtime(checkpoint: tuple[Path, Path]) -> Iterator[Runtime]:
    """It on torch."""
    with open_runtime(checkpoint[0], device="cpu", threads=1, depth_head=checkpoint[1]) as made:
        yield made


@pytest.fixture(scope="session", params=["torch", "onnx", *SERVERS])
def runtime(request: pytest.FixtureRequest, torch_runtime: Runtime) -> Iterator[Runtime]:
    """It on each engine in turn: torch, ONNX Runtime, a gRPC server, an HTTP server."""
    if request.param == "torch":
        yield torch_runtime
    elif request.param == "onnx":
        with open_runtime(request.getfixturevalue("exported").onnx, device="cpu", threads=1) as made:
            yield made
    else:
        with SERVERS[request.param](Served(torch_runtime, max_batch_size=2)) as address, open_runtime(address) as made:
            yield made
