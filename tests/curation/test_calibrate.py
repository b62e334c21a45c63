"""Precision and recall of thresholds on labelled pairs, and what is found of planted copies."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from curation.calibrate import COSINES, calibrate, cosine_curve, hash_curve, show
from curation.deduplicate import DeduplicateSpec
from curation.neighbours import unit_rows
from curation.whitening import fit_whitening
from data.datasets import open_dataset
from data.errors import InputError
from tests.curation.images import PixelRuntime, make_heap


def test_the_curve_counts_all_pairs() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(15), 3)
    rows = unit_rows(rng.normal(size=(15, 6))[groups] + 0.3 * rng.normal(size=(45, 6)))
    curve = cosine_curve(rows, groups)
    pairs = [(rows[i] @ rows[j], groups[i] == groups[j]) for i, j in itertools.combinations(range(45), 2)]
    for place in range(0, len(COSINES), 10):
        above = [same for cosine, same in pairs if cosine > COSINES[place]]
        assert curve.recall[place] == pytest.approx(sum(above) / 45)
        assert curve.precision[place] == pytest.approx(np.mean(above) if above else 1.0)
    best = curve.lowest_with(0.9)
    assert best is not None
    assert curve.precision[best] >= 0.9
    assert all(curve.recall[best] >= curve.recall[other] for other in np.flatnonzero(curve.precision >= 0.9))


def test_hashes_are_counted_by_differing_bits() -> None:
    hashes = np.array([0b0, 0b1, 0b111, 0xFF00], np.uint64)
    curve = hash_curve(hashes, np.array([0, 0, 1, 1]))
    assert curve.recall[[0, 1, 11]].tolist() == [0, 0.5, 1.0]
    assert curve.precision[[1, 2]].tolist() == [1.0, 0.5]


def test_a_set_without_copies_is_refused() -> None:
    with pytest.raises(InputError, match="no two images are of one group"):
        cosine_curve(unit_rows(np.eye(3)), np.arange(3))


def test_planted_copies_are_found_by_kind_and_strangers_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(make_heap(tmp_path / "heap"))
    spec = DeduplicateSpec(threshold=0.9, whiten=0)
    result = calibrate(PixelRuntime(), dataset, dataset, 0.95, spec, 20, seed=0)
    planted = result["planted"]
    assert planted["none"]["embedding"] < 0.05
    assert planted["resize"]["embedding"] == planted["recompress"]["embedding"] == planted["flip"]["embedding"] == 1.0
    assert planted["crop"]["embedding"] < planted["resize"]["embedding"]
    assert planted["recompress"]["hash"] > 0.5 > planted["flip"]["hash"]
    show(result)
    assert "planted flip" in capsys.readouterr().out


def test_whitening_gives_every_direction_the_same_weight_and_strangers_a_cosine_near_0() -> None:
    rng = np.random.default_rng(0)
    common = 5 * rng.normal(size=32)
    rows = unit_rows(common + rng.normal(size=(2000, 32)) * np.linspace(0.1, 2, 32))
    assert np.median(rows[:500] @ rows[500:1000].T) > 0.8
    white = fit_whitening(rows, 16)
    assert white.directions_DE.shape == (32, 16)
    spread = ((rows - white.mean_D) @ white.directions_DE).std(axis=0)
    assert np.allclose(spread, 1, atol=0.05)
    assert abs(np.median(white(rows[:500]) @ white(rows[500:1000]).T)) < 0.05


def test_few_images_keep_few_directions() -> None:
    rows = unit_rows(np.random.default_rng(0).normal(size=(20, 32)))
    assert fit_whitening(rows, 16).directions_DE.shape == (32, 5)
