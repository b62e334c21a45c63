"""What the classification commands have in common: the arithmetic of the process that asked is left as it was found."""

from pathlib import Path

import pytest
import torch

from evaluators.classification import RunOptions, denormals_flushed, measure_parts
from evaluators.extract import FeatureTable
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
