"""Exports of one size, and exports that take images of 8 bits, are served like any other: what they do not take is refused in a line."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from data.decode import decode_image
from data.errors import InputError
from data.preprocess import normalise, whole_view
from exports.onnx_file import OnnxSpec
from exports.to_onnx import export_onnx
from runtimes import remote
from runtimes.open import open_runtime
from runtimes.runtime import Runtime
from server.repository import check_network
from server.run import Running
from tests.server.conftest import PREPROCESS, config_of
from tests.server.images import png
from tests.server.wires import images, open_wire, refused

SPECS = {"fixed": OnnxSpec(fixed_px=(32, 32)), "shades": OnnxSpec(uint8=True)}


@pytest.fixture(scope="module")
def files(network: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    for name, spec in SPECS.items():
        export_onnx(network / "backbone.safetensors", folder / f"{name}.onnx", network / "depth.safetensors", spec=spec)
    return {name: folder / f"{name}.onnx" for name in SPECS}


@pytest.fixture(scope="module", params=SPECS)
def served(request: pytest.FixtureRequest, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    with Running(config_of(files[request.param], tmp_path_factory.mktemp("state"))) as running:
        yield request.param, running


@pytest.fixture
def wire(served: tuple[str, Running]) -> Iterator:
    opened = open_wire("grpc", served[1].addresses)
    yield opened
    opened.close()


def test_images_are_answered_as_by_the_network_itself(served: tuple[str, Running], wire, runtime: Runtime) -> None:
    side = 32 if served[0] == "fixed" else PREPROCESS.whole_px
    view = whole_view(decode_image(png(0)), PREPROCESS, side)[None]
    wanted = runtime.run(view, ("attention", "depth"))
    found = {name: wire.infer(name, images(png(0)))[name] for name in wanted}
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=2e-3 * np.abs(array).max())


def test_the_same_file_can_be_loaded_again(served: tuple[str, Running]) -> None:
    answer = httpx.post(f"{served[1].addresses.http}/v2/repository/models/backbone/load", timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_size_that_was_not_exported_is_the_requests_mistake(files: dict[str, Path], tmp_path: Path) -> None:
    with Running(config_of(files["fixed"], tmp_path)) as running:
        opened = open_wire("grpc", running.addresses)
        for model in ("attention", "depth", "overview"):
            kind, line = refused(opened.infer, model, images(png(0)), parameters={"size": 64})
            assert (kind, "takes images of 32x32 only" in line) == ("invalid", True)
        kind, line = refused(opened.infer, "backbone", {"pixels": np.zeros((1, 3, 8, 16), np.float32)})
        assert (kind, "wanted [-1, 3, 32, 32]" in line) == ("invalid", True)
        kind, line = refused(opened.infer, "backbone", {"pixels": np.zeros((1, 8, 16, 3), np.uint8)})
        assert (kind, "takes images of 32x32 only" in line) == ("invalid", True)
        opened.close()


def test_an_export_of_a_size_that_nobody_embeds_is_refused_with_what_to_do(network: Path, tmp_path: Path) -> None:
    file = tmp_path / "wide.onnx"
    export_onnx(network / "backbone.safetensors", file, spec=OnnxSpec(fixed_px=(32, 64)))
    with pytest.raises(InputError, match=r"takes images of 32x64 only, 32x32 came, .* export it for 32x32 pixels"):
        Running(config_of(file, tmp_path / "state")).__enter__()


def test_metadata_of_an_export_of_one_size_names_it(files: dict[str, Path], tmp_path: Path) -> None:
    """As that of an exported Triton repository does: load generators make their requests of it."""
    with Running(config_of(files["fixed"], tmp_path)) as running:
        metadata = httpx.get(f"{running.addresses.http}/v2/models/backbone").json()
        wire = open_wire("grpc", running.addresses)
        found = wire.infer("backbone", {"pixels": np.zeros((2, 3, 32, 32), np.float32)})
        wire.close()
    assert [one["shape"] for one in metadata["inputs"]] == [[-1, 3, 32, 32]]
    shapes = {one["name"]: one["shape"] for one in metadata["outputs"]}
    assert shapes == {"embedding": [-1, 48], "patches": [-1, 16, 48], "attention": [-1, 3, 4, 4]}
    assert all(list(found[name].shape[1:]) == shape[1:] for name, shape in shapes.items())


def test_requests_to_an_export_of_one_size_are_as_large_as_to_any_other(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata tell of all places of an image, and not of one that is to be multiplied."""
    monkeypatch.setattr(remote, "MAX_MESSAGE_BYTES", 8 * 3 * 32 * 32 * 4)
    pixels = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    with Running(config_of(files["fixed"], tmp_path)) as running:
        with open_runtime(f"grpc://{running.addresses.grpc}") as served:
            served.run(pixels, ("patches", "attention"))
        (counted,) = httpx.get(f"{running.addresses.http}/v2/models/backbone/stats").json()["model_stats"]
    assert (counted["inference_count"], counted["inference_stats"]["success"]["count"]) == (8, 1)


def test_pixels_of_no_8_bit_image_are_the_requests_mistake(files: dict[str, Path], tmp_path: Path) -> None:
    """Each request is looked at by itself, so that no other one of its batch fails with it."""
    shades = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    with Running(config_of(files["shades"], tmp_path)) as running:
        opened = open_wire("grpc", running.addresses)
        kind, line = refused(opened.infer, "backbone", {"pixels": np.full((1, 3, 32, 32), 0.123, np.float32)})
        assert (kind, "takes images of 8 bits" in line) == ("invalid", True)
        normalised = opened.infer("backbone", {"pixels": normalise(shades, PREPROCESS)[None]})["embedding"]
        np.testing.assert_array_equal(opened.infer("backbone", {"pixels": shades[None]})["embedding"], normalised)
        opened.close()


def test_a_network_is_checked_at_the_sizes_that_it_takes(files: dict[str, Path]) -> None:
    with open_runtime(files["fixed"], device="cpu", threads=1) as fixed:
        check_network((fixed,), {32, 48}, None)
        with pytest.raises(InputError, match="32x32 only"):
            fixed.check_sides(48, 48)


def test_every_network_can_be_warmed_up(files: dict[str, Path]) -> None:
    for path in files.values():
        with open_runtime(path, device="cpu", threads=1) as opened:
            opened.warm_up()
