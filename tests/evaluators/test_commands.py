"""The commands as a user runs them: what they print, write, cache, leave out and refuse, on a checkpoint and its export."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from data.datasets import open_dataset
from evaluators import report
from evaluators.baselines import open_baseline
from evaluators.combinations import combinations
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.knn import evaluate
from evaluators.results import SCHEMA, load_predictions, load_result
from evaluators.splits import labelled, open_splits
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from runtimes.torch_runtime import TorchRuntime
from tests.backbones.nets import load_reference
from tests.evaluators.fakes import SMALL, MeanColourRuntime, colour_folder, small_checkpoint

LINEAR = ("--lr", "0.001", "0.1", "--min-steps", "30", "--epochs", "1")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("ckpt") / "small.safetensors", seed=7)


@pytest.fixture(scope="module")
def onnx(ckpt: Path) -> Path:
    export_onnx(ckpt, ckpt.with_suffix(".onnx"))
    return ckpt.with_suffix(".onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "data", n_train=10, n_val=8, contrast=1)


def command(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """`python -m evaluators.NAME ARGUMENTS` in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--threads", "1"])
    monkeypatch.delitem(sys.modules, f"evaluators.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"evaluators.{name}", run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("name", "flags"), [("knn", ("--k", "1", "5")), ("linear", LINEAR)])
def test_a_run_writes_one_result_file_and_a_second_one_takes_its_features_from_the_cache(
    name: str,
    flags: tuple[str, ...],
    ckpt: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--ckpt", ckpt, "--data", data, "--cache-dir", tmp_path / "cache", *flags)
    baselines = ("--baselines", "pixels", "untrained")
    assert command(monkeypatch, name, *arguments, *baselines, "--out", tmp_path / "a.json") == 0
    printed = capsys.readouterr().out
    assert "30 training and 24 test images, 3 classes" in printed
    assert "top1 minus untrained" in printed
    result = load_result(tmp_path / "a.json")
    assert (result["schema"], result["evaluator"]) == (SCHEMA, name)
    for key in ("protocol", "version", "selected_on", "chosen", "grid", "settings", "notes", "timing", "environment"):
        assert key in result
    top1 = result["metrics"]["top1"]
    assert top1["n"] == 24
    assert 0 <= top1["ci95"][0] <= top1["value"] <= top1["ci95"][1] <= 1
    assert result["model"]["weights_sha256"] != result["baselines"]["untrained"]["weights_sha256"]
    assert result["preprocess"]["size_px"] == SMALL.size_px
    for baseline in result["baselines"].values():
        difference = top1["value"] - baseline["metrics"]["top1"]["value"]
        assert baseline["difference"]["value"] == pytest.approx(difference)
    with np.load(tmp_path / result["predictions_file"]) as predictions:
        assert np.mean(predictions["predicted"] == predictions["labels"]) == top1["value"]

    assert command(monkeypatch, name, *arguments, "--out", tmp_path / "b.json") == 0
    again = json.loads((tmp_path / "b.json").read_text())
    assert (result["timing"]["features_from_cache"], again["timing"]["features_from_cache"]) == (False, True)
    assert (again["metrics"], again["grid"]) == (result["metrics"], result["grid"])


def test_checkpoint_and_export_give_the_same_features_and_the_same_accuracy(
    ckpt: Path, onnx: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_runtime(ckpt) as torch_runtime, open_runtime(onnx) as onnx_runtime:
        ours, exported = (extract(runtime, open_dataset(data)) for runtime in (torch_runtime, onnx_runtime))
    for column in ("embedding", "patch_mean"):
        np.testing.assert_allclose(exported.columns[column], ours.columns[column], atol=1e-4)
    results = []
    for number, path in enumerate((ckpt, onnx)):
        out = tmp_path / f"{number}.json"
        arguments = ("--ckpt", path, "--data", data, "--cache-dir", "None", "--out", out, "--baselines", "untrained")
        assert command(monkeypatch, "knn", *arguments) == 0
        results.append(load_result(out))
    assert [result["model"]["runtime"] for result in results] == ["torch", "onnxruntime"]
    assert results[0]["model"]["weights_sha256"] == results[1]["model"]["weights_sha256"]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["baselines"]["untrained"]["metrics"] == results[1]["baselines"]["untrained"]["metrics"]


def test_corrupt_images_are_left_out_listed_and_told(
    ckpt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = colour_folder(tmp_path / "many", n_val=20)
    (data / "val" / "red" / "2.png").write_bytes(b"")
    out = tmp_path / "a.json"
    assert command(monkeypatch, "knn", "--ckpt", ckpt, "--data", data, "--cache-dir", "None", "--out", out) == 0
    assert "1 val images could not be decoded and were left out: val/red/2.png (empty)" in capsys.readouterr().out
    result = load_result(out)
    assert result["data"]["skipped"] == {"val/red/2.png": "empty"}
    assert result["metrics"]["top1"]["n"] == result["data"]["n_val"] == 59


def test_an_interrupted_run_ends_with_130_and_the_next_one_goes_on(
    ckpt: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dying, next_one = MeanColourRuntime(), MeanColourRuntime()
    dying.die_after = 20
    runtimes = iter((dying, next_one))
    monkeypatch.setattr("evaluators.classification.open_runtime", lambda *_, **__: next(runtimes))
    arguments = ("--ckpt", ckpt, "--data", data, "--cache-dir", tmp_path / "cache", "--batch-size", "5")
    assert command(monkeypatch, "knn", *arguments) == 130
    assert capsys.readouterr().err.endswith("stopped\n")
    assert command(monkeypatch, "knn", *arguments) == 0
    assert (dying.images, next_one.images) == (20, 54 - 20)


def test_bad_input_ends_with_2_and_one_line(
    ckpt: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unlabelled = data / "train" / "red"
    one_class = colour_folder(tmp_path / "one")
    for split in ("train", "val"):
        for colour in ("red", "green"):
            (one_class / split / colour).rename(tmp_path / f"{split}-{colour}")
    cases = [
        ("knn", ("--ckpt", ckpt, "--data", tmp_path / "none"), "nothing there; wanted a folder"),
        ("knn", ("--ckpt", ckpt, "--data", unlabelled), "has a label; wanted class folders"),
        ("linear", ("--ckpt", ckpt, "--data", one_class), "all images are of class 'blue'"),
        ("knn", ("--ckpt", ckpt, "--data", data, "--k", "31"), "--k 31: there are only 30 training images"),
        ("knn", ("--ckpt", tmp_path / "x.safetensors", "--data", data), "no such file"),
        ("knn", ("--ckpt", ckpt, "--data", data, "--out", tmp_path / "a.txt"), "ends in .json"),
        ("linear", ("--ckpt", ckpt, "--data", data, "--seed", 10**30), f"--seed {10**30}: wanted a whole number"),
        ("depth", ("--ckpt", ckpt, "--data", data, "--lr", "nan"), "--lr nan: wanted learning rates above 0"),
        ("knn", ("--ckpt", ckpt, "--data", data, "--n-per-class", "0"), "--n-per-class and --tries: wanted"),
        ("logistic", ("--ckpt", ckpt, "--data", data, "--C", "0"), "--C 0.0: wanted numbers above 0"),
        ("ridge", ("--ckpt", ckpt, "--data", one_class), "all images are of class 'blue'"),
        ("retrieval", ("--ckpt", ckpt, "--data", unlabelled), "has no column 'label'; wanted class folders"),
        ("copies", ("--ckpt", ckpt, "--data", data), "no column 'group'; wanted a table"),
        ("depth", ("--ckpt", ckpt, "--data", data), "not every image has a depth map"),
    ]
    for name, arguments, message in cases:
        assert command(monkeypatch, name, *arguments, "--cache-dir", "None") == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last


@pytest.mark.parametrize("variant", ["noreg_mlp", "reg4_mlp"])
def test_what_the_linear_probe_sees_equals_the_official_features(variant: str, reference: Path) -> None:
    backbone, io = load_reference(reference / "v2_vit" / variant)
    wanted = load_file(reference / "linear_features" / "features.safetensors")
    with TorchRuntime(backbone, device="cpu") as runtime:
        made = runtime.run(io["native/image"].numpy(), ("embedding", "patches"))
    columns = {"embedding": made["embedding"], "patch_mean": made["patches"].mean(axis=1)}
    names = ("a", "b")
    combined = combinations(FeatureTable(names, names, names, columns))
    np.testing.assert_allclose(combined["cls"], wanted[f"v2_{variant}_n1_avgpool0"], atol=2e-5)
    np.testing.assert_allclose(combined["cls+patch_mean"], wanted[f"v2_{variant}_n1_avgpool1"], atol=2e-5)


def test_raw_pixels_on_the_shared_photographs_are_far_above_chance_and_below_the_best_naive_method(
    ckpt: Path, shared_data: Path
) -> None:
    splits = labelled(open_splits(shared_data / "photos"), "photos")
    with open_runtime(ckpt) as runtime, open_baseline("pixels", runtime.manifest, "cpu", 0) as pixels:
        spec = ExtractSpec(columns=("embedding",))
        train, val = (extract(pixels, part, spec) for part in (splits.train, splits.val))
    found = evaluate(train, val)
    assert (len(train), len(val)) == (180, 116)
    assert 0.22 < found.metrics["top1"].value < 0.45


@pytest.mark.parametrize(("name", "flags"), [("knn", ("--k", "1")), ("linear", LINEAR)])
def test_names_that_are_not_utf8_are_names_too(
    name: str, flags: tuple[str, ...], ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old archives hold Latin-1 names, which Python reads as lone surrogates."""
    for split in ("train", "val"):
        os.rename(data / split / "red", os.fsencode(data / split) + b"/caf\xe9")
    assert command(monkeypatch, name, "--ckpt", ckpt, "--data", data, "--out", tmp_path / "a.json", *flags) == 0
    assert "caf\udce9" in load_predictions(tmp_path / "a.json", load_result(tmp_path / "a.json"))["classes"]
    report.main((tmp_path / "a.json",), tmp_path / "page.html")
    assert "caf\\udce9" in (tmp_path / "page.html").read_text()


def test_files_whose_names_are_not_utf8_are_split_and_measured(
    ckpt: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = data / "train" / "red"
    os.rename(next(red.glob("*.png")), os.fsencode(red) + b"/caf\xe9.png")
    assert command(monkeypatch, "knn", "--ckpt", ckpt, "--data", data / "train", "--k", "1") == 0
