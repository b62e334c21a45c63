"""The linear evaluator: what it trains on, how it chooses, and the head it writes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbones.checkpoints import CheckpointError
from backbones.heads import LinearHead, load_head
from data.errors import CheckFailed, InputError
from evaluators import linear
from evaluators.classification import ClassificationRun
from evaluators.combinations import combinations, names_for, wide
from evaluators.extract import FeatureTable, extract
from evaluators.linear import LinearSpec, choose, evaluate, held_out_scores, run
from evaluators.linear_grid import Heads, train_grid, train_heads
from evaluators.splits import FOLDS, hash_bucket, open_splits
from runtimes.open import open_runtime
from tests.evaluators.fakes import colour_folder, small_checkpoint

QUICK = LinearSpec(lr=(1e-3, 1e-1), min_steps=40, epochs=1)


def blobs(n: int, seed: int, groups: list[str] | None = None) -> FeatureTable:
    """Three noisy classes; the CLS says little, the mean patch much."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    cls = np.eye(3)[labels] + rng.normal(scale=2.0, size=(n, 3))
    patch_mean = np.eye(3)[labels] * 2 + rng.normal(scale=0.5, size=(n, 3))
    names = tuple(f"image{seed}-{i}" for i in range(n))
    columns = {"embedding": cls.astype(np.float32), "patch_mean": patch_mean.astype(np.float32)}
    return FeatureTable(names, tuple(f"class {label}" for label in labels), tuple(groups or names), columns)


def test_the_combinations_are_cls_alone_and_cls_followed_by_the_mean_patch() -> None:
    table = blobs(6, 0)
    combined = combinations(table)
    assert names_for(None, table) == ("cls", "cls+patch_mean")
    np.testing.assert_array_equal(combined["cls"], table.features)
    np.testing.assert_array_equal(combined["cls+patch_mean"][:, :3], table.features)
    np.testing.assert_array_equal(combined["cls+patch_mean"][:, 3:], table.columns["patch_mean"])


def test_a_head_of_the_grid_is_the_head_trained_alone() -> None:
    train, test = blobs(90, 0), blobs(60, 1)
    together = evaluate(train, test, QUICK, seed=4)
    for lr in QUICK.lr:
        alone = evaluate(train, test, LinearSpec(lr=(lr,), min_steps=40, epochs=1), seed=4)
        for entry in alone.grid:
            (same,) = (e for e in together.grid if (e["features"], e["lr_per_256"]) == (entry["features"], lr))
            assert {**same} == pytest.approx(entry)


@pytest.mark.parametrize(
    ("preset", "anneal", "version"), [("dino", "epoch", 3), ("dinov2", "step", 2), (None, "step", 2)]
)
def test_rates_fall_once_an_epoch_in_dinos_protocol_and_each_step_in_dinov2s(
    preset: Any, anneal: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = blobs(90, 0), blobs(60, 1)
    spec = LinearSpec(preset=preset, lr=(0.1,), epochs=5, min_steps=1, batch=10, views=0, select_on="val")
    taught = []

    def recorded(*args: Any, **how: Any) -> dict[str, Heads]:
        taught.append(how["anneal"])
        return train_grid(*args, **how)

    monkeypatch.setattr(linear, "train_grid", recorded)
    found = evaluate(train, test, spec, seed=4)
    assert taught == [anneal]
    assert ("cosine by epoch" in found.protocol) == (anneal == "epoch")
    assert found.version == version  # what else was measured before stays comparable


def test_held_out_images_are_judged_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once they would be 13 GB of logits on ImageNet."""
    table = blobs(200, 0)
    data, labels = wide([table], names_for(None, table)), torch.arange(200) % 3
    folds = np.array([hash_bucket(f"fold/{group}", FOLDS) for group in table.groups])
    at_once = held_out_scores(data, data, labels, folds, 3, QUICK, 0)
    shapes: list[int] = []
    judge = Heads.logits

    def counted(heads: Heads, features: torch.Tensor) -> torch.Tensor:
        logits = judge(heads, features)
        shapes.append(logits.numel())
        return logits

    monkeypatch.setattr(linear, "LOGITS_AT_ONCE", 60)
    monkeypatch.setattr(Heads, "logits", counted)
    in_parts = held_out_scores(data, data, labels, folds, 3, QUICK, 0)
    assert max(shapes) <= 60
    for name, figures in at_once.items():
        np.testing.assert_allclose(in_parts[name], figures, rtol=1e-5)


def entry(top1: float, loss: float | None, diverged: bool = False) -> dict[str, Any]:
    return {"train_held_out_top1": top1, "train_held_out_loss": loss, "diverged": diverged}


def test_among_heads_of_like_accuracy_the_one_of_least_loss_is_chosen() -> None:
    """0.40 of 100 has a standard error of 0.049: 0.36 is as good and 0.34 is not. Of a million it is 0.0005."""
    grid = [entry(0.34, 1.0), entry(0.36, 1.5), entry(0.40, 2.0), entry(0.40, None), entry(0.9, 0.1, diverged=True)]
    assert choose(grid, 100) == 1
    assert choose(grid, 1_000_000) == 2
    assert choose([entry(0.5, 1.0), entry(0.5, 0.9)], 1_000_000) == 1
    assert choose([entry(1.0, 0.2), entry(1.0, 0.1), entry(0.99, 0.0)], 10) == 1


def test_the_head_is_chosen_on_training_images_it_did_not_see() -> None:
    train, test = blobs(150, 0), blobs(90, 1)
    found = evaluate(train, test, QUICK, seed=0)
    assert found.chosen["features"] == "cls+patch_mean"
    assert found.selected_on.startswith("train")
    by_train = {(e["features"], e["lr_per_256"]): e["train_held_out_top1"] for e in found.grid}
    assert by_train[found.chosen["features"], found.chosen["lr_per_256"]] > max(by_train.values()) - 0.1
    shuffled = FeatureTable(test.names, test.labels[1:] + test.labels[:1], test.groups, test.columns)
    assert evaluate(train, shuffled, QUICK, seed=0).chosen == found.chosen  # test labels have no say
    published = evaluate(train, test, LinearSpec(lr=QUICK.lr, min_steps=40, epochs=1, select_on="val"), seed=0)
    assert published.metrics["top1"].value == max(e["top1"] for e in published.grid)
    assert published.metrics["top1"].value == found.metrics["top1_best_on_val"].value


def test_held_out_scores_are_those_of_heads_trained_on_the_other_parts() -> None:
    table = blobs(60, 0)
    labels = torch.tensor([int(str(label)[-1]) for label in table.labels])
    folds = np.array([hash_bucket(f"fold/{name}", FOLDS) for name in table.names])
    features, view = {"cls": torch.tensor(table.features)}, wide([table], ["cls"])
    spec = LinearSpec(lr=(0.02,), min_steps=30, epochs=1, held_out=2)
    ((hits, losses),) = held_out_scores(view, view, labels, folds, 3, spec, seed=1).values()
    right, cost = [], []
    for fold in (0, 1):
        out = torch.from_numpy(folds == fold)
        n = int((~out).sum())
        head = train_heads(features["cls"][~out], labels[~out], 3, [0.02 * n / 256], steps=30, batch=n, seed=1)
        logits = head.logits(features["cls"][out])[:, 0]
        right += (logits.argmax(dim=1) == labels[out]).tolist()
        cost += torch.nn.functional.cross_entropy(logits, labels[out], reduction="none").tolist()
    assert hits[0] == pytest.approx(np.mean(right))
    assert losses[0] == pytest.approx(np.mean(cost), rel=1e-5)


@pytest.mark.parametrize(("groups", "parts"), [(90, "3 held-out fifths in turn"), (2, "2 held-out fifths in turn")])
def test_the_result_says_how_many_parts_were_held_out(groups: int, parts: str) -> None:
    """Three are asked for; two groups fall to two parts, the first and the last."""
    names = [next(f"{g}-{i}" for i in range(99) if hash_bucket(f"fold/{g}-{i}", FOLDS) == g * 4) for g in (0, 1)]
    table = blobs(90, 0, groups=[names[i % 2] for i in range(90)] if groups == 2 else None)
    assert evaluate(table, blobs(30, 1), QUICK).selected_on == f"train, {parts}"


def test_images_of_one_group_cannot_choose_a_head() -> None:
    table = blobs(30, 0, groups=["one"] * 30)
    with pytest.raises(InputError, match=r"cannot be cut into parts.*--group-by none or --select-on val"):
        evaluate(table, blobs(9, 1), QUICK)


def test_the_saved_head_gives_the_reported_accuracy_and_fits_no_other_backbone(tmp_path: Path) -> None:
    data = colour_folder(tmp_path / "data", n_val=12, contrast=1)
    ckpt, other = small_checkpoint(tmp_path / "a.safetensors"), small_checkpoint(tmp_path / "b.safetensors", seed=1)
    options = ClassificationRun(ckpt=str(ckpt), data=str(data), cache_dir=None, threads=1)
    result = run(options, QUICK, tmp_path / "head.safetensors")
    with open_runtime(ckpt) as runtime, open_runtime(other) as stranger:
        head, manifest = load_head(tmp_path / "head.safetensors", runtime.manifest.weights_sha256)
        test = extract(runtime, open_splits(data).val)
        with pytest.raises(CheckpointError, match="fits the backbone"):
            load_head(tmp_path / "head.safetensors", stranger.manifest.weights_sha256)
    assert isinstance(head, LinearHead)
    assert manifest.classes == ("blue", "green", "red")
    assert manifest.metrics["top1"]["value"] == result["metrics"]["top1"]["value"]
    with torch.inference_mode():
        logits = head(torch.tensor(combinations(test)[manifest.features]))
    guessed = [manifest.classes[i] for i in logits.argmax(dim=1).tolist()]
    assert 0 < result["metrics"]["top1"]["value"] < 1
    assert np.mean([a == b for a, b in zip(guessed, test.labels, strict=True)]) == result["metrics"]["top1"]["value"]


def test_a_head_file_of_another_ending_is_refused_before_anything_runs(tmp_path: Path) -> None:
    options = ClassificationRun(ckpt="nowhere", data="nowhere")
    with pytest.raises(InputError, match=r"--save-head .*head\.pt: wanted a name that ends in \.safetensors"):
        run(options, QUICK, tmp_path / "head.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": ()}, "--lr"),
        ({"lr": (0.0,)}, "--lr"),
        ({"lr": (math.nan,)}, "--lr"),
        ({"lr": (0.1, math.inf)}, "--lr"),
        ({"epochs": 0}, "--epochs"),
        ({"batch": 0}, "--batch"),
        ({"held_out": 6}, "--held-out 6: wanted 1 to 5"),
    ],
)
def test_impossible_settings_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearSpec(**flags)


def test_a_diverged_head_is_not_the_best_however_well_it_guesses() -> None:
    """Its logits count as 0, which is the first class throughout."""
    train, test = blobs(40, 0), blobs(20, 1)
    first_only = FeatureTable(test.names, ("class 0",) * 20, test.groups, test.columns)
    spec = LinearSpec(lr=(1e-3, 1e39), min_steps=20, epochs=1, select_on="val")
    found = evaluate(train, first_only, spec)
    assert [entry["diverged"] for entry in found.grid] == [False, True, False, True]
    assert found.chosen["lr_per_256"] == 1e-3
    assert found.metrics["top1_best_on_val"].value < 1


def test_an_infinite_loss_can_be_written_down() -> None:
    found = evaluate(blobs(40, 0), blobs(20, 1), LinearSpec(lr=(1e-2, 3e38), min_steps=20, epochs=1))
    assert json.loads(json.dumps(found.grid, allow_nan=False)) == found.grid


def test_a_grid_of_diverged_heads_is_no_result() -> None:
    with pytest.raises(CheckFailed, match="all 4 heads diverged; lower the learning rates"):
        evaluate(blobs(40, 0), blobs(20, 1), LinearSpec(lr=(1e39, 3e39), min_steps=20, epochs=1))
