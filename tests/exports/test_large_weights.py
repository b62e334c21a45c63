"""Weights too many for one .onnx: two files that appear and are read together, everywhere one is. The limit is lowered here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from data.errors import InputError
from exports import graph, onnx_file, to_onnx
from exports.compare import compare, size_mb
from exports.onnx_file import OnnxSpec
from exports.to_onnx import export_onnx
from exports.to_triton import export_triton
from runtimes.onnx_runtime import EXPORT_KEY, OnnxRuntime
from runtimes.open import open_runtime
from runtimes.weight_file import PAGE_BYTES
from server.artifacts import load_artifacts
from tests.exports.artifacts import artifact, save_network
from tests.exports.test_heads_in_graph import make_head_file
from tests.exports.test_precision import ANY
from tests.server.conftest import config_of


@pytest.fixture(autouse=True)
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of 100 kB are too large, and what has a kilobyte is a large weight."""
    artifact("v1")  # shared with other tests, and written in one file
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 50_000)
    monkeypatch.setattr(graph, "LEAST_BYTES", 1024)


def same(found: Path, wanted: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((5, 3, 24, 40), dtype=np.float32)
    with open_runtime(found) as a, OnnxRuntime(wanted) as b:
        assert (a.outputs, a.manifest) == (b.outputs, b.manifest)
        for name, array in b.run(pixels, b.outputs).items():
            np.testing.assert_array_equal(a.run(pixels, (name,))[name], array)


def test_two_files_that_compute_what_one_does(tmp_path: Path) -> None:
    v1 = artifact("v1")
    done = export_onnx(v1.ckpt, tmp_path / "x.onnx", v1.depth_head)
    assert done.parity == v1.parity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    model = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    outside = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    assert {one.name.split(".")[0] for one in outside} == {"pos_embed", "patch_embed", "blocks"}
    for one in outside:
        told = {entry.key: entry.value for entry in one.external_data}
        assert told["location"] == "x.onnx.data"
        assert int(told["offset"]) % PAGE_BYTES == 0
    assert not any(one.raw_data for one in outside)
    assert (tmp_path / "x.onnx.data").stat().st_size > (tmp_path / "x.onnx").stat().st_size / 2
    same(tmp_path / "x.onnx", v1.onnx)
    assert size_mb(str(tmp_path / "x.onnx")) == pytest.approx(
        sum(path.stat().st_size for path in tmp_path.iterdir()) / 1e6
    )


def test_the_second_file_is_the_same_every_time_and_may_move_with_the_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_onnx(artifact("v1").ckpt, tmp_path / name / "x.onnx")
    files = [(tmp_path / name / "x.onnx.data").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "x.onnx").rename(tmp_path / "elsewhere" / "y.onnx")
    same(tmp_path / "elsewhere" / "y.onnx", tmp_path / "b" / "x.onnx")


@pytest.mark.parametrize("precision", ["fp16", "int8-static"])
def test_lower_precisions_keep_their_drift_beside_the_stamp(precision: Any, pictures: Path, tmp_path: Path) -> None:
    spec = OnnxSpec(precision=precision)
    export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx", spec=spec, data=str(pictures), tolerance=ANY)
    onnx_file.ONE_FILE_BYTES = 2**31  # undone by the fixture
    export_onnx(artifact("v1").ckpt, tmp_path / "y.onnx", spec=spec, data=str(pictures), tolerance=ANY)
    told = [
        json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}[EXPORT_KEY])
        for path in (tmp_path / "x.onnx", tmp_path / "y.onnx")
    ]
    assert len(told[0].pop("weights_sha256", "")) == (64 if precision == "fp16" else 0)
    assert told[0] == told[1]
    assert told[0]["drift"]["images"] == 52
    same(tmp_path / "x.onnx", tmp_path / "y.onnx")


def test_servers_repositories_and_comparisons_take_them(pictures: Path, tmp_path: Path) -> None:
    ckpt, depth = save_network("v1", tmp_path / "made")
    segmentation = make_head_file(ckpt, "segmentation", {"layers": (0, 1)}, tmp_path / "segmentation.safetensors")
    export_onnx(ckpt, tmp_path / "models" / "x.onnx", depth, segmentation_head=segmentation)
    loaded = load_artifacts(config_of(tmp_path / "models", tmp_path / "state"))
    assert loaded.runtimes[0].name == "onnxruntime"
    assert loaded.runtimes[0].outputs == ("embedding", "patches", "attention", "depth", "classes")
    found = compare(str(ckpt), str(tmp_path / "models" / "x.onnx"), str(pictures), rounds=1, batches=(1,))
    assert found.drift.cosine_min > 0.99999
    export_triton(ckpt, tmp_path / "repository", depth_head=depth, segmentation_head=segmentation)
    files = {str(path.relative_to(tmp_path / "repository")) for path in (tmp_path / "repository").rglob("*.onnx*")}
    assert files == {
        "backbone/1/model.onnx",
        "backbone/1/model.onnx.data",
        "depth_head/1/head.onnx",
        "classes_head/1/head.onnx",
    }
    served = load_artifacts(config_of(tmp_path / "repository", tmp_path / "state")).runtimes[0]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 24, 24), dtype=np.float32)
    np.testing.assert_array_equal(served.run(pixels)["embedding"], loaded.runtimes[0].run(pixels)["embedding"])
    for head in ("depth_head", "classes_head"):
        onnx.checker.check_model(str(tmp_path / "repository" / head / "1" / "head.onnx"), full_check=True)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def other(file: Path) -> None:
    """The weights of another network of the same sizes."""
    ckpt, _ = save_network("v1", file.parent / "other", seed=1)
    export_onnx(ckpt, file.parent / "other" / "x.onnx")
    shutil.move(file.parent / "other" / "x.onnx.data", file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, r"x\.onnx\.data: no such file; it holds the weights of x\.onnx, keep the two together"),
        (cut, r"x\.onnx\.data: has \d+ bytes, x\.onnx reads \d+; was it cut short\?"),
        (other, r"x\.onnx\.data: was not written with x\.onnx; export it again"),
        (lambda file: file.write_bytes(b""), "was not written with"),
    ],
)
def test_half_of_a_pair_is_refused(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx")
    spoil(tmp_path / "x.onnx.data")
    with pytest.raises(InputError, match=words):
        open_runtime(tmp_path / "x.onnx")


@pytest.mark.parametrize("location", ["/etc/passwd", "../x.onnx.data", "", ".."])
def test_weights_are_read_from_beside_the_file_only(location: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    export_onnx(artifact("v1").ckpt, tmp_path / "in" / "x.onnx")
    (tmp_path / "in" / "x.onnx.data").rename(tmp_path / "x.onnx.data")
    model = onnx.load(tmp_path / "in" / "x.onnx", load_external_data=False)
    for one in model.graph.initializer:
        for entry in one.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (tmp_path / "in" / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="wanted one file beside it"):
        open_runtime(tmp_path / "in" / "x.onnx")


def test_what_is_there_is_not_written_over_and_an_accident_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.onnx.data").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"x\.onnx\.data: is there already"):
        export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx.data"]
    (tmp_path / "x.onnx.data").unlink()
    replace, seen = to_onnx.os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        seen.append(Path(target).name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(to_onnx.os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(artifact("v1").ckpt, tmp_path / "x.onnx")
    assert seen == ["x.onnx.data", "x.onnx"]
    assert list(tmp_path.iterdir()) == []
