"""Any two runtimes side by side: what is told of each, and what cannot be compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from exports.compare import compare, size_mb, table
from exports.onnx_file import OnnxSpec
from exports.to_onnx import export_onnx
from tests.exports.artifacts import artifact
from tests.exports.test_precision import ANY


def test_a_checkpoint_and_its_file_are_alike_and_both_are_told_of(
    pictures: Path, tmp_path: Path, repo_root: Path
) -> None:
    v1 = artifact("v1")
    command = [sys.executable, "-m", "exports.compare", str(v1.ckpt), str(v1.onnx), "--data", str(pictures)]
    command += ["--rounds", "2", "--batches", "1", "3", "--out", str(tmp_path / "x.json")]
    ended = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["a"]["engine"], found["b"]["engine"]) == ("torch", "onnxruntime")
    assert [one["batch"] for one in found["b"]["speed"]] == [1, 3]
    assert min(one["cpu_ms"] for side in "ab" for one in found[side]["speed"]) > 0
    assert found["a"]["megabytes"] == pytest.approx(v1.ckpt.stat().st_size / 1e6)
    assert found["drift"]["cosine_min"] > 0.99999
    assert found["drift"]["knn_before"] == found["drift"]["knn_after"]
    assert set(found["differences"]) == {"embedding", "patches", "attention"}
    assert max(found["differences"].values()) < 1e-4
    for word in ("torch/cpu", "onnxruntime/cpu", "batch 3", "k-NN top-1 on 52 images"):
        assert word in ended.stdout


def test_another_precision_shows(pictures: Path, tmp_path: Path) -> None:
    export_onnx(
        artifact("v1").ckpt, tmp_path / "x.onnx", spec=OnnxSpec(precision="int8"), data=str(pictures), tolerance=ANY
    )
    found = compare(str(artifact("v1").onnx), str(tmp_path / "x.onnx"), str(pictures), rounds=1)
    assert (found.a.precision, found.b.precision) == ("fp32", "int8")
    assert found.drift.cosine_mean < 0.99999
    assert "int8" in table(found)


def test_what_cannot_be_compared_is_refused(pictures: Path, tmp_path: Path) -> None:
    v1, v2 = str(artifact("v1").onnx), str(artifact("v2").onnx)
    for pair, options, words in (
        ((v1, v2), {}, "see images in different ways"),
        ((v1, str(tmp_path / "none.onnx")), {}, "no such file"),
        ((v1, v1), {"rounds": 0}, "--rounds 0"),
        ((v1, v1), {"batches": (0,)}, "wanted at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            compare(*pair, str(pictures), **options)  # type: ignore[arg-type]
    assert size_mb("grpc://127.0.0.1:1") is None
