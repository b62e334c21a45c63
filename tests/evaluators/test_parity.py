"""Two runtimes of one network: the export agrees, another network does not, and the command's status says so."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.checkpoints import Manifest, save_backbone
from backbones.vit import ViT, ViTSpec
from data.preprocess import Preprocess
from evaluators.parity import SCHEMA, difference
from exports.to_onnx import export_onnx
from tests.evaluators.fakes import SMALL, colour_folder, small_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its export, another checkpoint, and labelled images."""
    root = tmp_path_factory.mktemp("parity")
    small_checkpoint(root / "a.safetensors", seed=7)
    small_checkpoint(root / "other.safetensors", seed=8)
    export_onnx(root / "a.safetensors", root / "a.onnx")
    colour_folder(root / "data", n_train=6, n_val=4, contrast=1)
    return root


def command(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["parity", *map(str, words), "--threads", "1"])
        patch.delitem(sys.modules, "evaluators.parity", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("evaluators.parity", run_name="__main__")
    return int(ended.value.code or 0)


def test_an_export_says_what_its_checkpoint_says(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity.json"
    words = ("--data", place / "data", "--evaluators", "knn", "retrieval", "--out", out)
    assert command(place / "a.safetensors", place / "a.onnx", *words) == 0
    assert "within tolerance" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["schema"] == SCHEMA
    assert found["same_weights"]
    assert found["complaints"] == []
    assert {"embedding", "patches", "attention"} <= set(found["features"])
    assert all(one["relative_max"] < 1e-3 and one["n"] == 12 for one in found["features"].values())
    assert set(found["metrics"]) == {"knn", "retrieval"}
    assert all(abs(one["difference"]) < 2e-3 for metrics in found["metrics"].values() for one in metrics.values())


def test_another_network_is_told_with_its_worst_image_and_status_3(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", place / "data", "--evaluators", "knn")
    assert command(place / "a.safetensors", place / "other.safetensors", *words) == 3
    said = capsys.readouterr()
    assert "name different weights" in said.out
    lines = said.err.strip().splitlines()
    error = [line for line in lines if line.startswith("error:")]
    assert len(error) == 1
    assert "embedding of 'val/" in error[0]
    assert "tolerance 0.001" in error[0]


def test_a_tolerance_of_nothing_is_exceeded_by_rounding(place: Path) -> None:
    words = ("--data", place / "data", "--evaluators", "knn", "--feature-tolerance", "0")
    assert command(place / "a.safetensors", place / "a.onnx", *words) == 3


def test_bad_input_is_one_line_and_status_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        (place / "a.safetensors", place / "absent.onnx", "--data", place / "data"),
        (place / "a.safetensors", place / "a.onnx", "--data", place / "absent"),
        (place / "a.safetensors", "grpc://127.0.0.1:9", "--data", place / "data"),
    ):
        assert command(*words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_differences_are_taken_image_by_image() -> None:
    """Oracle: by hand."""
    a = np.array([[3.0, 4.0], [1.0, 0.0]])
    b = np.array([[3.0, 4.0], [0.0, 1.0]])
    found = difference(a, b)
    assert found["relative_max"] == pytest.approx(2**0.5)
    assert found["cosine_min"] == pytest.approx(0)
    assert (found["largest"], found["worst_row"], found["n"]) == (1, 1, 2)
    assert difference(a, np.zeros((2, 3)))["shapes"] == [[2], [3]]


def test_what_is_not_finite_is_told_of_the_network_that_it_is_of(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ViT(ViTSpec(patch_px=8, width=16, depth=2, heads=2, img_px=32))
    with torch.no_grad():
        model.norm.bias[3] = float("nan")
    save_backbone(tmp_path / "nan.safetensors", model, Manifest(architecture={}, preprocess=SMALL, source="random"))
    out = tmp_path / "parity.json"
    assert command(place / "a.safetensors", tmp_path / "nan.safetensors", "--data", place / "data", "--out", out) == 3
    assert "embedding is not finite for 12 of 12 images in B, first 'val/" in capsys.readouterr().err

    def no_number(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    found = json.loads(out.read_text(), parse_constant=no_number)
    assert found["features"]["embedding"]["not_finite"] == [0, 12]
    assert found["metrics"] == {}


def test_networks_of_two_patch_sizes_see_their_own_views_and_differ(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ViT(ViTSpec(patch_px=14, width=16, depth=2, heads=2, img_px=56))
    preprocess = Preprocess(size_px=56, resize_px=64, whole_px=56)
    save_backbone(tmp_path / "b.safetensors", model, Manifest(architecture={}, preprocess=preprocess, source="random"))
    for pair in (
        (place / "a.safetensors", tmp_path / "b.safetensors"),
        (tmp_path / "b.safetensors", place / "a.safetensors"),
    ):
        assert command(*pair, "--data", place / "data") == 3
        assert "preprocessing differs: resize_px, size_px, whole_px" in capsys.readouterr().err
