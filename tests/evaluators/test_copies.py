"""Copy detection: pairs of near-duplicates, Copydays as distributed, whitening as published."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data.errors import InputError
from evaluators.copies import CopiesRun, CopiesSpec, describe, evaluate_copydays, evaluate_pairs, learn_whitening, run
from evaluators.extract import FeatureTable
from tests.evaluators.fakes import small_checkpoint


def table(features: np.ndarray, names: list[str] | None = None) -> FeatureTable:
    names = names or [f"image{i}" for i in range(len(features))]
    columns = {"embedding": np.asarray(features, np.float32)}
    return FeatureTable(tuple(names), (None,) * len(names), tuple(names), columns, tuple(range(len(names))))


def test_average_precision_over_pairs_is_that_of_all_pairs_listed_one_by_one() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 3)) + np.repeat(rng.normal(size=(4, 3)), 3, axis=0)
    groups = [str(i // 3) for i in range(10)] + ["x", "y"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(float(unit[i] @ unit[j]), groups[i] == groups[j]) for i in range(12) for j in range(i)]
    pairs.sort(reverse=True)
    precisions, hits = [], 0
    for rank, (_, alike) in enumerate(pairs, start=1):
        hits += alike
        precisions += [hits / rank] if alike else []
    found = evaluate_pairs(table(features), groups)
    ap = found.metrics["ap"]
    assert ap.value == pytest.approx(np.mean(precisions))
    assert ap.n == len(precisions)
    assert ap.ci95 is not None
    assert ap.ci95[0] < ap.value < ap.ci95[1]
    with pytest.raises(InputError, match="no two of the 12 images share a group"):
        evaluate_pairs(table(features), [str(i) for i in range(12)])


def test_the_descriptor_is_cls_then_pooled_patches() -> None:
    columns = {"embedding": np.ones((2, 3), np.float32), "patch_gem": np.zeros((2, 3), np.float32)}
    names = ("a", "b")
    assert describe(FeatureTable(names, (None, None), names, columns)).tolist() == [[1, 1, 1, 0, 0, 0]] * 2


def test_whitened_features_have_unit_second_moments_of_their_own() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    whitening = learn_whitening(features)
    rotated = features @ whitening.matrix_DD.T  # moments are not centred, as published; the mean comes off afterwards
    np.testing.assert_allclose(rotated.T @ rotated / 500, np.eye(6), atol=1e-8)
    np.testing.assert_allclose(whitening.apply(features).mean(axis=0), 0, atol=1e-5)


def copydays(root: Path) -> Path:
    """Originals 200000.jpg, 200100.jpg, ... and blocks of copies that share the first four characters."""
    rng = np.random.default_rng(1)
    scenes = {f"2{i:03d}": cv2.resize(rng.integers(0, 255, (4, 5, 3)).astype(np.uint8), (60, 48)) for i in range(5)}
    blocks = {"original": "00", "jpegqual/5": "00", "jpegqual/75": "00", "crops/10": "00", "strong": "01"}
    for block, suffix in blocks.items():
        (root / block).mkdir(parents=True)
        for key, image in scenes.items():
            altered = image if block == "original" else image[2:-2, 3:-3]
            cv2.imwrite(str(root / block / f"{key}{suffix}.jpg"), altered)
    cv2.imwrite(str(root / "strong" / "200002.jpg"), scenes["2000"][:, ::-1])
    return root


def test_copydays_is_read_as_distributed(tmp_path: Path) -> None:
    root, ckpt = copydays(tmp_path / "copydays"), small_checkpoint(tmp_path / "a.safetensors")
    options = {"ckpt": str(ckpt), "cache_dir": None, "threads": 1}
    result = run(CopiesRun(data=f"copydays:{root}", baselines=("pixels",), **options))
    assert list(result["metrics"]) == ["map_strong", "map_jpegqual_5", "map_jpegqual_75", "map_crops_10"]
    assert (result["headline"], result["metrics"]["map_strong"]["n"]) == ("map_strong", 6)
    assert result["baselines"]["pixels"]["metrics"]["map_jpegqual_75"]["value"] == 1.0
    assert result["preprocess"]["view"] == "whole"
    more = run(
        CopiesRun(data=str(root), distractors=str(root / "strong"), whiten_data=str(root / "original"), **options)
    )
    assert "6 distractors" in more["protocol"]
    assert "whitened" in more["protocol"]
    told = [(one["settings"]["whitened"], one["settings"]["distractors"]) for one in (result, more)]
    assert told == [(False, 0), (True, 6)]


def test_only_the_first_twenty_results_count_and_distractors_push_copies_out() -> None:
    original, copy = table(np.array([[1.0, 0.2]]), ["2000a"]), table(np.array([[1.0, 0.0]]), ["2000b"])
    near = table(np.stack([np.ones(19), np.linspace(0, 0.1, 19)], axis=1))
    assert evaluate_copydays(original, {"strong": copy}).metrics["map_strong"].value == 1.0
    found = evaluate_copydays(original, {"strong": copy}, distractors=near).metrics["map_strong"].value
    assert found == pytest.approx((0 + 1 / 20) / 2)
    nearer = table(np.stack([np.ones(20), np.linspace(0, 0.1, 20)], axis=1))
    assert evaluate_copydays(original, {"strong": copy}, distractors=nearer).metrics["map_strong"].value == 0.0
    with pytest.raises(InputError, match="no original shares its first 4 characters"):
        evaluate_copydays(original, {"strong": table(np.ones((1, 2)), ["9999x"])})


def test_the_view_follows_the_preset_in_whole_patches_and_other_sets_need_their_column(tmp_path: Path) -> None:
    ckpt = small_checkpoint(tmp_path / "a.safetensors")
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 40, 3), 60 * i, np.uint8))
    csv = tmp_path / "list.csv"
    csv.write_text("path,group\n0.png,a\n1.png,a\n2.png,b\n3.png,b\n")
    options = {"ckpt": str(ckpt), "cache_dir": None, "threads": 1}
    result = run(CopiesRun(data=str(csv), **options), CopiesSpec(preset="dinov2"))
    assert result["preprocess"]["view_size_px"] == 320  # 322 in patches of 8
    assert (result["metrics"]["ap"]["n"], result["data"]["grouped_by"]) == (2, "group")
    with pytest.raises(InputError, match="no column 'twin'"):
        run(CopiesRun(data=str(csv), **options), CopiesSpec(group="twin"))
    with pytest.raises(InputError, match="smaller than one patch of 8"):
        run(CopiesRun(data=str(csv), **options), CopiesSpec(size_px=5))
    with pytest.raises(InputError, match=r"wanted original/ and strong/"):
        run(CopiesRun(data=f"copydays:{tmp_path}", **options))
