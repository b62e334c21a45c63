"""The exported repository inside a real Triton answers what our server answers, model by model. `make test-triton` runs this."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.preprocess import center_view
from exports import graph, onnx_file
from exports.to_triton import export_triton
from exports.triton_config import TritonSpec
from runtimes.open import open_runtime
from server.run import Running
from tests.evaluators.fakes import colour_folder
from tests.exports.artifacts import save_network
from tests.exports.real_triton import RealTriton, site_packages
from tests.exports.test_heads_in_graph import make_head_file
from tests.server.conftest import config_of
from tests.server.images import encode, jpeg, picture, png
from tests.server.wires import Refused, images, open_wire

pytestmark = [pytest.mark.triton, pytest.mark.timeout(900)]
FILES = (
    png(0),
    jpeg(1, 120, 60),
    encode(".webp", picture(2)),
    encode(".bmp", picture(3, 40, 40)),
    encode(".tiff", picture(4)),
)


class Both:
    """Our server and a real Triton, each behind the same wire."""

    def __init__(self, wire: str, ours: Running, triton: RealTriton) -> None:
        theirs = f"127.0.0.1:{triton.grpc}" if wire == "grpc" else f"http://127.0.0.1:{triton.http}"
        self.ours = open_wire(wire, ours.addresses)
        self.theirs = open_wire(wire, type(ours.addresses)(**{**vars(ours.addresses), wire: theirs}))

    def ask(self, model: str, *args: Any, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What each answers, ours first."""
        return self.ours.infer(model, *args, **options), self.theirs.infer(model, *args, **options)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, RealTriton]]:
    """One network with all heads in both, and in both the same collection."""
    site_packages()
    folder, scratch = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("triton")
    ckpt, depth = save_network("v1", folder)
    segmentation = make_head_file(ckpt, "segmentation", {"layers": (0, 1)}, folder / "segmentation.safetensors")
    linear = make_head_file(ckpt, "linear", {"features": "cls+patch_mean"}, folder / "linear.safetensors")
    colours = colour_folder(tmp_path_factory.mktemp("colours"))
    with Running(config_of(folder, scratch / "state", samples=str(colours / "train"))) as ours:
        served = export_triton(
            ckpt,
            scratch / "repository",
            TritonSpec(engine="python", max_batch=8),
            linear_head=linear,
            depth_head=depth,
            segmentation_head=segmentation,
            collections=scratch / "state",
        )
        assert served == ["backbone", "embedding", "attention", "classification", "depth", "segmentation", "knn"]
        with RealTriton(scratch / "repository", scratch) as triton:
            yield ours, triton


@pytest.fixture(params=["grpc", "http"])
def both(request: pytest.FixtureRequest, servers: tuple[Running, RealTriton]) -> Both:
    return Both(request.param, *servers)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, wanted in ours.items():
        found = theirs[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        if wanted.dtype == np.float32:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(np.abs(wanted).max())))
        elif wanted.dtype == np.int32:
            assert (found != wanted).mean() < 2e-3
        else:
            assert (found != wanted).sum() <= (1 if wanted.dtype == np.uint8 else 0), name


OUTPUTS = ("embedding", "patches", "attention")


@pytest.mark.parametrize("shape", [(1, 3, 24, 24), (5, 3, 8, 48), (2, 3, 40, 40)])
def test_backbone(both: Both, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    same(*both.ask("backbone", {"pixels": pixels}, OUTPUTS))
    same(*both.ask("backbone", {"pixels": pixels}, ("attention",)))


@pytest.mark.parametrize("parameters", [{}, {"normalize": True}, {"normalize": False}])
def test_embedding(both: Both, parameters: dict[str, Any]) -> None:
    same(*both.ask("embedding", images(*FILES), parameters=parameters))


def test_classification(both: Both) -> None:
    same(*both.ask("classification", images(*FILES)))


@pytest.mark.parametrize("parameters", [{}, {"size": 96}, {"mass": 0.3, "size": 8}])
def test_attention(both: Both, parameters: dict[str, Any]) -> None:
    same(*both.ask("attention", images(*FILES), parameters=parameters))


@pytest.mark.parametrize("model", ["depth", "segmentation"])
@pytest.mark.parametrize("parameters", [{}, {"size": 96}])
def test_maps(both: Both, model: str, parameters: dict[str, Any]) -> None:
    same(*both.ask(model, images(*FILES), parameters=parameters))


@pytest.mark.parametrize("parameters", [{}, {"k": 7}, {"collection": "samples", "k": 24}])
def test_knn(both: Both, parameters: dict[str, Any]) -> None:
    same(*both.ask("knn", images(*FILES), parameters=parameters))
    vectors = np.random.default_rng(0).standard_normal((3, 32), dtype=np.float32)
    same(*both.ask("knn", {"embedding": vectors}, parameters=parameters))


@pytest.mark.parametrize(
    ("model", "inputs", "parameters"),
    [
        ("embedding", images(b"junk"), {}),
        ("embedding", images(FILES[0], FILES[1][:100]), {}),
        ("depth", images(FILES[0]), {"size": 30}),
        ("attention", images(FILES[0]), {"mass": 2.0}),
        ("knn", images(FILES[0]), {"k": 1000}),
        ("knn", {"embedding": np.zeros((1, 32), np.float32)}, {}),
    ],
    ids=range(6),
)
def test_what_cannot_be_used_is_the_clients_fault_on_both(
    servers: tuple[Running, RealTriton], model: str, inputs: dict[str, np.ndarray], parameters: dict[str, Any]
) -> None:
    both = Both("grpc", *servers)
    lines = []
    for wire in (both.ours, both.theirs):
        with pytest.raises(Refused) as caught:
            wire.infer(model, inputs, parameters=parameters)
        assert caught.value.kind == "invalid"
        lines.append(caught.value.line)
    assert any(word in lines[1] for word in lines[0].split() if len(word) > 6)


def test_requests_side_by_side_are_answered_as_alone(servers: tuple[Running, RealTriton]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    both = Both("grpc", *servers)
    rng = np.random.default_rng(1)
    batches = [rng.standard_normal((1 + k % 3, 3, 24, 8 * (1 + k % 2)), dtype=np.float32) for k in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pixels: both.theirs.infer("backbone", {"pixels": pixels}, OUTPUTS), batches))
    for pixels, answer in zip(batches, found, strict=True):
        same(both.ours.infer("backbone", {"pixels": pixels}, OUTPUTS), answer)


def test_an_evaluator_may_name_it_as_its_network(servers: tuple[Running, RealTriton]) -> None:
    ours, triton = servers
    addresses = (f"grpc://{ours.addresses.grpc}", f"grpc://127.0.0.1:{triton.grpc}")
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    found = []
    for address in addresses:
        with open_runtime(address) as runtime:
            found.append(runtime.run(center_view(image, runtime.manifest.preprocess)[None], ("embedding",)))
    same(*found)


def test_weights_in_a_second_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_packages()
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 50_000)
    monkeypatch.setattr(graph, "LEAST_BYTES", 1024)
    ckpt, _ = save_network("v1", tmp_path)
    export_triton(ckpt, tmp_path / "repository", TritonSpec(engine="python"))
    assert (tmp_path / "repository" / "backbone" / "1" / "model.onnx.data").is_file()
    pixels = np.random.default_rng(0).standard_normal((3, 3, 24, 40), dtype=np.float32)
    with (
        RealTriton(tmp_path / "repository", tmp_path) as triton,
        open_runtime(f"grpc://127.0.0.1:{triton.grpc}") as found,
        open_runtime(ckpt, device="cpu") as wanted,
    ):
        same(wanted.run(pixels, OUTPUTS), found.run(pixels, OUTPUTS))
