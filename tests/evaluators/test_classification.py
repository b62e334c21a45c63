"""What the classification commands have in common: arithmetic that is left as it was found, and tables that are a row an image."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import InputError
from evaluators import copies, knn, linear, logistic, retrieval, ridge
from evaluators.classification import ClassificationRun, RunOptions, denormals_flushed, measure_parts
from evaluators.extract import FeatureTable
from evaluators.presets import evaluator_cli
from evaluators.results import Measurement
from evaluators.splits import open_splits
from runtimes.open import open_runtime
from tests.evaluators.fakes import colour_folder, small_checkpoint


def half_of_the_smallest_normal() -> float:
    return float(torch.tensor([torch.finfo(torch.float32).tiny]).div_(2))


def test_denormals_are_zero_within_and_as_before_afterwards() -> None:
    with denormals_flushed():
        assert half_of_the_smallest_normal() == 0.0
    assert half_of_the_smallest_normal() > 0.0


def test_an_evaluation_that_fails_leaves_no_trace_in_the_arithmetic() -> None:
    with pytest.raises(RuntimeError), denormals_flushed():
        raise RuntimeError
    assert half_of_the_smallest_normal() > 0.0


def test_whoever_had_denormals_flushed_keeps_it() -> None:
    with denormals_flushed():
        with denormals_flushed():
            pass
        assert half_of_the_smallest_normal() == 0.0


def test_an_evaluation_sees_no_denormals_and_leaves_them_to_others(tmp_path: Path) -> None:
    within = []

    def evaluate(tables: list[FeatureTable]) -> Measurement:
        within.append(half_of_the_smallest_normal())
        return Measurement(
            evaluator="some", protocol="", version=1, metrics={}, headline="", selected_on="", chosen={}, grid=[]
        )

    parts = {"val": open_splits(colour_folder(tmp_path / "data", n_val=3)).val}
    ckpt = small_checkpoint(tmp_path / "backbone.safetensors")
    with open_runtime(ckpt) as runtime:
        measure_parts(
            "some", runtime, parts, None, RunOptions(ckpt=str(ckpt), data="", cache_dir=None, threads=1), evaluate
        )
    assert within == [0.0]
    assert half_of_the_smallest_normal() > 0.0


@pytest.mark.parametrize("lacking", ["names", "labels", "groups", "columns"])
@pytest.mark.parametrize("evaluate", [knn.evaluate, linear.evaluate, logistic.evaluate, ridge.evaluate])
def test_labels_that_do_not_match_the_features_are_one_clear_error(
    evaluate: Callable[[FeatureTable, FeatureTable], Measurement], lacking: str
) -> None:
    names, labels = tuple("abcdef"), tuple("xyxyxy")
    whole = FeatureTable(names, labels, names, {"embedding": np.eye(6, dtype=np.float32)})
    shorter = {"embedding": whole.features[:5]} if lacking == "columns" else getattr(whole, lacking)[:5]
    with pytest.raises(InputError, match="wanted one of each for every image"):
        evaluate(replace(whole, **{lacking: shorter}), whole)


def test_keys_that_do_not_match_the_features_are_one_clear_error() -> None:
    names = tuple("abcdef")
    table = FeatureTable(names, (None,) * 6, names, {"embedding": np.eye(6, dtype=np.float32)})
    for evaluate in (retrieval.evaluate, copies.evaluate_pairs):
        with pytest.raises(InputError, match=r"5 (keys|groups) for 6 images"):
            evaluate(table, ["x"] * 5)


@pytest.mark.parametrize("evaluator", ["linear", "logistic", "segmentation", "depth"])
def test_a_head_is_not_written_over_a_network(evaluator: str, tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    before = ckpt.read_bytes()
    words = ["--ckpt", str(ckpt), "--data", str(tmp_path), "--save-head", str(ckpt)]
    with pytest.raises(InputError, match="there is a backbone already, which would be lost"):
        evaluator_cli(importlib.import_module(f"evaluators.{evaluator}").main, words)
    assert ckpt.read_bytes() == before


def test_a_head_may_take_the_place_of_a_head(tmp_path: Path) -> None:
    ckpt, data = small_checkpoint(tmp_path / "a.safetensors"), colour_folder(tmp_path / "data")
    options = ClassificationRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1)
    for _ in range(2):
        logistic.run(options, logistic.LogisticSpec(C=(1.0,)), tmp_path / "head.safetensors")
    (tmp_path / "notes.safetensors").write_text("mine")
    with pytest.raises(InputError, match="there is a file that is no head of ours already"):
        logistic.run(options, logistic.LogisticSpec(C=(1.0,)), tmp_path / "notes.safetensors")
