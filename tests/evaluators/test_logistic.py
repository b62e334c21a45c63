"""Logistic regression: the optimum (its gradient, and scikit-learn's), the path, how C is chosen, and the saved head."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from backbones.checkpoints import Manifest, save_backbone
from backbones.heads import load_head
from backbones.vit import ViT, ViTSpec
from data.errors import InputError
from data.preprocess import Preprocess
from evaluators.classification import ClassificationRun
from evaluators.extract import FeatureTable
from evaluators.logistic import PROTOCOL_C, LogisticSpec, evaluate, run
from evaluators.logistic_path import fit_path
from runtimes.open import open_runtime
from tests.evaluators.fakes import colour_folder, small_checkpoint


def problem(n: int = 300, width: int = 12, n_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes with features of very different spread, and a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    means = torch.randn(n_classes, width, generator=generator)
    features = means[labels] + 1.5 * torch.randn(n, width, generator=generator)
    return features * torch.logspace(1, -2, width) + 3, labels


def objective(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, C: float
) -> float:
    logits = features.double() @ weight.double().T + bias.double()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return float(loss + weight.double().square().sum() / (2 * C * len(labels)))


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0, 100.0])
def test_the_optimum_is_scikit_learns_and_its_gradient_vanishes(C: float) -> None:
    features, labels = problem()
    (found,) = fit_path(features, labels, 5, [C])
    reference = LogisticRegression(C=C, tol=1e-10, max_iter=500).fit(features.double().numpy(), labels.numpy())
    wanted = objective(features, labels, torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_), C)
    ours = objective(features, labels, found.weight_KD, found.bias_K, C)
    assert ours <= wanted * (1 + 1e-6)
    assert found.objective == pytest.approx(ours, rel=1e-5)
    weight, bias = found.weight_KD.double().requires_grad_(), found.bias_K.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, labels)
    (loss + weight.square().sum() / (2 * C * len(labels))).backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 2e-4


def test_the_path_is_as_good_at_every_c_as_a_fit_from_scratch_and_cheaper() -> None:
    features, labels = problem(600)
    path = fit_path(features, labels, 5, PROTOCOL_C)
    assert [one.C for one in path] == sorted(PROTOCOL_C)
    alone = [fit_path(features, labels, 5, [C])[0] for C in PROTOCOL_C]
    for warm, cold in zip(path, alone, strict=True):
        assert warm.objective <= cold.objective * (1 + 1e-5)
    assert sum(one.products for one in path) < 0.5 * sum(one.products for one in alone)


def test_each_fit_tells_its_gradient_and_why_it_ended() -> None:
    features, labels = problem()
    for one in fit_path(features, labels, 5, [1e-3, 1e-1, 10.0]):
        assert one.stopped in ("gradient", "precision")
        assert 0 <= one.gradient < 0.05
    (short,) = fit_path(features, labels, 5, [10.0], max_iterations=1)
    assert (short.stopped, short.iterations) == ("iterations", 1)


def test_separable_classes_and_constant_features_end() -> None:
    features = torch.eye(4)[torch.arange(40) % 4]
    features = torch.cat([features, torch.ones(40, 2)], dim=1)
    labels = torch.arange(40) % 4
    for one in fit_path(features, labels, 4, [1e-6, 1.0, 1e5]):
        assert math.isfinite(one.objective)
    assert ((features @ one.weight_KD.T + one.bias_K).argmax(dim=1) == labels).all()


def test_features_without_any_information_end_at_the_classes_shares() -> None:
    (found,) = fit_path(torch.zeros(10, 3), torch.arange(10) % 2, 2, [1.0])
    assert found.objective == pytest.approx(math.log(2))
    (skewed,) = fit_path(torch.zeros(10, 3), (torch.arange(10) < 3).long(), 2, [1.0])
    assert torch.softmax(skewed.bias_K, dim=0).tolist() == pytest.approx([0.7, 0.3], abs=1e-3)


def blobs(n: int, seed: int, groups: list[str] | None = None) -> FeatureTable:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = np.eye(3, 6)[labels] + rng.normal(scale=0.7, size=(n, 6))
    names = tuple(f"image{seed}-{i}" for i in range(n))
    classes = tuple(f"class {label}" for label in labels)
    return FeatureTable(names, classes, tuple(groups or names), {"embedding": features.astype(np.float32)})


def test_c_is_chosen_on_training_images_and_test_labels_have_no_say() -> None:
    train, test = blobs(150, 0), blobs(90, 1)
    found = evaluate(train, test)
    assert len(found.grid) == 45
    assert found.selected_on == "train, one held-out tenth"
    by_train = {entry["C"]: entry["train_held_out_top1"] for entry in found.grid}
    assert by_train[found.chosen["C"]] == max(by_train.values())
    shuffled = FeatureTable(test.names, test.labels[1:] + test.labels[:1], test.groups, test.columns)
    assert evaluate(train, shuffled).chosen == found.chosen
    published = evaluate(train, test, LogisticSpec(select_on="val"))
    assert published.metrics["top1"].value == max(entry["top1"] for entry in published.grid)
    assert json.loads(json.dumps(found.grid, allow_nan=False)) == found.grid
    assert any("relative gradient" in note for note in found.notes)


def test_both_backends_agree() -> None:
    train, test = blobs(150, 0), blobs(90, 1)
    ours, theirs = (evaluate(train, test, LogisticSpec(C=(0.1, 1.0), backend=name)) for name in ("path", "sklearn"))
    for one, other in zip(ours.grid, theirs.grid, strict=True):
        assert one["objective"] == pytest.approx(other["objective"], rel=1e-5)
        assert one["top1"] == pytest.approx(other["top1"], abs=0.02)
    np.testing.assert_allclose(ours.learned["weight"], theirs.learned["weight"], atol=5e-3)


@pytest.mark.parametrize("backend", ["path", "sklearn"])
def test_two_classes_and_a_class_without_training_images(backend: str) -> None:
    train = blobs(60, 0)
    two = FeatureTable(train.names, tuple("ab"[i % 2] for i in range(60)), train.groups, train.columns)
    test = FeatureTable(two.names[:9], ("c", *two.labels[1:9]), two.groups[:9], {"embedding": two.features[:9]})
    found = evaluate(two, test, LogisticSpec(C=(1.0,), backend=backend))  # type: ignore[arg-type]
    assert found.predictions["classes"].tolist() == ["a", "b", "c"]
    assert (found.predictions["predicted"] < 2).all()


def test_too_few_images_to_choose_on_are_refused_with_the_way_out() -> None:
    tied = blobs(30, 0, groups=["one"] * 30)
    with pytest.raises(InputError, match=r"too few to choose C.*name one --C, or use --select-on val"):
        evaluate(tied, blobs(9, 1))
    assert evaluate(tied, blobs(9, 1), LogisticSpec(C=(1.0,))).selected_on == "nothing"
    one_class = FeatureTable(tied.names, ("a",) * 30, tied.groups, tied.columns)
    with pytest.raises(InputError, match="all 30 training images are of class 'a'"):
        evaluate(one_class, blobs(9, 1), LogisticSpec(C=(1.0,)))
    for flags, message in (({"C": ()}, "--C"), ({"C": (0.0,)}, "--C"), ({"max_iterations": 0}, "--max-iterations")):
        with pytest.raises(InputError, match=message):
            LogisticSpec(**flags)


def test_the_saved_head_and_the_published_view(tmp_path: Path) -> None:
    data, ckpt = colour_folder(tmp_path / "data", n_train=20), small_checkpoint(tmp_path / "a.safetensors")
    options = ClassificationRun(ckpt=str(ckpt), data=str(data), cache_dir=tmp_path / "cache", threads=1)
    result = run(options, LogisticSpec(C=(0.1, 10.0)), tmp_path / "head.safetensors")
    with open_runtime(ckpt) as runtime:
        _, manifest = load_head(tmp_path / "head.safetensors", runtime.manifest.weights_sha256)
    assert (manifest.features, manifest.classes) == ("cls", ("blue", "green", "red"))
    assert result["preprocess"]["view"] == "center"
    published = run(options, LogisticSpec(C=(0.1, 10.0), preset="dinov2"))
    assert published["preprocess"]["view_resize_px"] == 32
    assert run(options, LogisticSpec(C=(1.0,)))["timing"]["features_from_cache"]


def test_a_head_that_was_fitted_to_other_views_than_are_served_says_so(tmp_path: Path) -> None:
    model = ViT(ViTSpec(patch_px=8, width=16, depth=2, heads=2, img_px=32))
    seen = Preprocess(size_px=32, resize_px=40, whole_px=32)
    save_backbone(tmp_path / "a.safetensors", model, Manifest(architecture={}, preprocess=seen))
    data = colour_folder(tmp_path / "data", n_train=3, n_val=1)
    options = ClassificationRun(ckpt=str(tmp_path / "a.safetensors"), data=str(data), cache_dir=None, threads=1)
    for preset, head, told in ((None, "h", False), ("dinov2", None, False), ("dinov2", "h", True)):
        path = tmp_path / f"{head}.safetensors" if head else None
        result = run(options, LogisticSpec(preset=preset, C=(1.0,)), path)  # type: ignore[arg-type]
        assert any("without the margin" in note for note in result["notes"]) is told
