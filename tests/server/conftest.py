"""One small network, and one server of it that most tests share."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import trustme

from backbones.checkpoints import Manifest, save_backbone
from backbones.heads import DepthHead, DepthHeadSpec, HeadManifest, save_head
from backbones.vit import ViT, ViTSpec
from data.preprocess import Preprocess
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from runtimes.runtime import Runtime
from server.config import ServerConfig
from server.run import Running
from tests.evaluators.fakes import colour_folder
from tests.server.gate import ROWS, GatedRuntime
from tests.server.images import png
from tests.server.postgres import MISSING, find_programs, running_postgres
from tests.server.wires import JsonWire, TritonWire, images, open_wire

PREPROCESS = Preprocess(size_px=32, resize_px=40, whole_px=48)
"""Two views that nobody can mistake for each other."""
QUEUE_ROWS = 32
MAX_MESSAGE_MB = 4


def save_network(folder: Path, seed: int) -> Path:
    """backbone.safetensors and depth.safetensors that fit each other, with weights large enough for lively outputs."""
    torch.manual_seed(seed)
    model = ViT(ViTSpec(patch_px=8, width=48, depth=2, heads=3, img_px=32))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    written = save_backbone(
        folder / "backbone.safetensors", model, Manifest(architecture={}, preprocess=PREPROCESS, source="random")
    )
    head = DepthHead(DepthHeadSpec(width_in=96, bins=16, unit="furlong"))
    manifest = HeadManifest(kind="depth", backbone_sha256=written.weights_sha256, spec={})
    save_head(folder / "depth.safetensors", head, manifest)
    return folder


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `models/`: a backbone and its depth head."""
    return save_network(tmp_path_factory.mktemp("network"), seed=0)


@pytest.fixture(scope="session")
def other_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another backbone of the same shape, and its depth head."""
    return save_network(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def onnx_file(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as one .onnx with all outputs."""
    out = tmp_path_factory.mktemp("onnx") / "backbone.onnx"
    export_onnx(network / "backbone.safetensors", out, network / "depth.safetensors")
    return out


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 labelled images to learn from, 12 to test."""
    return colour_folder(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="session")
def runtime(network: Path) -> Iterator[Runtime]:
    """The network itself, with no server around it."""
    with open_runtime(
        network / "backbone.safetensors", device="cpu", threads=1, depth_head=network / "depth.safetensors"
    ) as made:
        yield made


def config_of(models: Path, state: Path, **changes: object) -> ServerConfig:
    """A configuration for tests: free ports, one copy on one thread."""
    fields = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "device": "cpu", "samples": "none"}
    fields |= {"instances": 1, "threads": 1}
    return ServerConfig(models=models, collections=state, **(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def server(network: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the network; its samples are the images of `colours`."""
    config = config_of(
        network,
        tmp_path_factory.mktemp("state"),
        samples=str(colours / "train"),
        evaluation_data=(f"colours={colours}",),
        queue_rows=QUEUE_ROWS,
        max_message_mb=MAX_MESSAGE_MB,
        max_size_px=128,
    )
    with Running(config) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    """The HTTP port of the shared server."""
    with httpx.Client(base_url=server.addresses.http, timeout=60) as client:
        yield client


@pytest.fixture(params=["grpc", "http", "json"])
def wire(server: Running, request: pytest.FixtureRequest) -> Iterator[TritonWire | JsonWire]:
    """Every wire of KServe v2 in turn."""
    opened = open_wire(request.param, server.addresses)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files of an authority, a server and a client."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("127.0.0.1", "client@tests"):
        pair = authority.issue_cert(name)
        stem = "server" if name[0] == "1" else "client"
        pair.private_key_pem.write_to_path(str(folder / f"{stem}.key"))
        for number, part in enumerate(pair.cert_chain_pems):
            part.write_to_path(str(folder / f"{stem}.pem"), append=number > 0)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own."""
    programs = find_programs()
    if programs is None:
        pytest.skip(MISSING)
    with running_postgres(programs) as (url, _):
        yield url


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    """The URL of an empty database."""
    import psycopg

    name = f"tests_{uuid.uuid4().hex}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres.removesuffix("postgres") + name
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def goes_on_serving(server):
    """After each test the server still answers, on both ports."""
    yield
    for name in ("grpc", "http"):
        opened = open_wire(name, server.addresses)
        assert opened.infer("embedding", images(png(0)))["embedding"].shape == (1, 48)
        opened.close()


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[tuple[Running, GatedRuntime]]:
    """A server that takes 8 rows at a time, in batches of 4, and its network."""
    runtime = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", queue_rows=ROWS, max_batch_rows=4)
    with Running(config, runtime.load) as running:
        runtime.batches.clear()
        yield running, runtime
        runtime.gate.set()
