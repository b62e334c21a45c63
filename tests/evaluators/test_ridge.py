"""Ridge regression in closed form: the normal equations, leaving one out, and the few-shot evaluator on top."""

import numpy as np
import pytest
import torch

from data.errors import InputError
from evaluators.extract import FeatureTable
from evaluators.ridge import Ridge, RidgeSpec, evaluate, ridge_path


def by_normal_equations(x: np.ndarray, y: np.ndarray, queries: np.ndarray, strength: float) -> np.ndarray:
    """One fit, by solving for weights and a free intercept. The penalty's scale is that of all of `x`."""
    centred = x - x.mean(axis=0)
    weight = np.linalg.solve(centred.T @ centred + strength * np.eye(x.shape[1]), centred.T @ (y - y.mean(axis=0)))
    return (queries - x.mean(axis=0)) @ weight + y.mean(axis=0)


@pytest.mark.parametrize("n", [8, 30])
def test_every_strength_and_every_left_out_image_equals_a_fit_of_its_own(n: int) -> None:
    rng = np.random.default_rng(0)
    x, queries = rng.normal(size=(n, 12)), rng.normal(size=(5, 12))
    y = np.eye(3)[np.arange(n) % 3]
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    scale = float(np.mean(values**2))
    found, left_out = ridge_path(torch.tensor(x), torch.tensor(y), torch.tensor(queries), (0.01, 1.0))
    for at, strength in enumerate((0.01, 1.0)):
        np.testing.assert_allclose(found[at], by_normal_equations(x, y, queries, strength * scale), atol=1e-8)
        for i in range(n):
            others = np.arange(n) != i
            alone = by_normal_equations(x[others], y[others], x[i : i + 1], strength * scale)[0]
            np.testing.assert_allclose(left_out[at, i], alone, atol=1e-8)


def blobs(n: int, seed: int) -> FeatureTable:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = np.eye(3, 6)[labels] * 2 + rng.normal(scale=0.5, size=(n, 6))
    names = tuple(f"image{seed}-{i}" for i in range(n))
    return FeatureTable(names, tuple(map(str, labels)), names, {"embedding": features.astype(np.float32)})


def test_more_images_a_class_help_and_the_figures_are_means_over_tries() -> None:
    found = evaluate(blobs(120, 0), blobs(300, 1), RidgeSpec(n_per_class=(1, 20), tries=3))
    assert found.headline == "top1_20_per_class"
    assert found.metrics["top1_20_per_class"].value > found.metrics["top1_1_per_class"].value
    few = [entry["top1"] for entry in found.grid if entry["n_per_class"] == 20]
    assert len(few) == 3
    assert found.metrics["top1_20_per_class"].value == pytest.approx(np.mean(few))
    assert found.predictions["score"].mean() == pytest.approx(np.mean(few))


def test_test_images_are_asked_about_at_the_chosen_strength_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All strengths at once are gigabytes where there are many test images and classes."""
    asked: list[float] = []
    predict = Ridge.predict

    def noted(path: Ridge, queries: torch.Tensor, strength: float) -> torch.Tensor:
        asked.append(strength)
        return predict(path, queries, strength)

    monkeypatch.setattr(Ridge, "predict", noted)
    found = evaluate(blobs(60, 0), blobs(30, 1), RidgeSpec(n_per_class=(5,), tries=2))
    assert asked == [entry["strength"] for entry in found.grid]


@pytest.mark.parametrize("flags", [{"n_per_class": ()}, {"n_per_class": (0,)}, {"tries": 0}, {"strength": (-1.0,)}])
def test_impossible_settings_are_refused(flags: dict) -> None:
    with pytest.raises(InputError, match="--"):
        RidgeSpec(**flags)
