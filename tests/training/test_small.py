"""The rule for little data: what it gives at both ends and between, and that the command resolves it from the images it finds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.datasets import open_dataset
from data.errors import InputError
from training.loop import Plan, train
from training.small import SMALL, fit_to_data, on_log_scale, prototypes_for


@pytest.mark.parametrize(
    ("n_images", "prototypes"),
    [
        (2, 2),
        (300, 256),
        (1000, 512),
        (7250, 1024),
        (50_000, 2048),
        (100_000, 4096),
        (1_281_167, 65_536),
        (10**8, 65_536),
    ],
)
def test_prototypes_grow_with_the_images_and_never_outnumber_them(n_images: int, prototypes: int) -> None:
    assert prototypes_for(n_images) == prototypes


def test_quantities_move_evenly_on_a_log_scale() -> None:
    assert on_log_scale(10, (10, 1000), (1.0, 3.0)) == 1.0
    assert on_log_scale(100, (10, 1000), (1.0, 3.0)) == pytest.approx(2.0)
    assert on_log_scale(10**6, (10, 1000), (1.0, 3.0)) == 3.0
    assert on_log_scale(1, (10, 1000), (1.0, 3.0)) == 1.0


@pytest.mark.parametrize("name", SMALL)
def test_a_million_images_meet_the_published_values(name: str) -> None:
    recipe = fit_to_data(name, 1_281_167, batch_size=512, epochs=100)
    assert recipe.head.prototypes == 65_536
    assert recipe.optim.teacher_temperature == pytest.approx((0.04, 0.07))
    assert recipe.optim.momentum == pytest.approx((0.996, 1.0), abs=1e-5)
    assert recipe.optim.warmup_epochs == 10
    assert recipe.optim.freeze_last_layer_epochs == 1


@pytest.mark.parametrize("name", SMALL)
def test_few_images_get_a_sharper_teacher_a_faster_average_and_more_passes(name: str) -> None:
    few, many = fit_to_data(name, 2_000), fit_to_data(name, 200_000)
    assert few.optim.teacher_temperature < many.optim.teacher_temperature
    assert few.optim.momentum <= many.optim.momentum
    assert few.epochs > many.epochs
    assert few.optim.freeze_last_layer_epochs <= 1


def test_the_learning_rate_follows_the_root_of_the_batch() -> None:
    one, four = (fit_to_data("dinov2_small", 50_000, batch_size=b) for b in (64, 256))
    assert four.optim.peak_lr(256) == pytest.approx(2 * one.optim.peak_lr(64))


@pytest.mark.parametrize(("n_images", "batch"), [(2, 2), (9, 2), (40, 8), (127, 16), (128, 32), (10**6, 32)])
def test_the_batch_shrinks_with_a_very_small_set(n_images: int, batch: int) -> None:
    recipe = fit_to_data("dinov2_small_cpu", n_images)
    assert recipe.batch_size == batch <= n_images
    Plan(recipe, n_images // batch).at(0)


def test_one_image_is_refused() -> None:
    with pytest.raises(InputError, match="needs at least 2"):
        fit_to_data("dino_small", 1)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"epochs": 0}])
def test_lengths_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="want at least 1"):
        fit_to_data("dino_small", 100, **wrong)


@pytest.mark.parametrize("name", SMALL)
def test_it_trains(name: str, images: Path, tmp_path: Path) -> None:
    """The rule's values on a network of a toy's size."""
    recipe = fit_to_data(name, 10, epochs=2)
    recipe = replace(
        recipe,
        backbone=replace(recipe.backbone, patch_px=8, width=24, depth=2, heads=3, img_px=32),
        crops=replace(recipe.crops, global_px=32, local_px=16, n_local=2),
        head=replace(recipe.head, hidden=16, bottleneck=8),
    )
    data = open_dataset(str(images))
    train(recipe, data, tmp_path / "run", recipe_name=name, source="", revision="", workers=0, stop_at_step=2)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 2


def test_the_command_resolves_the_rule_and_writes_it_down(images: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ["--recipe", "dinov2_small_cpu", "--data", str(images), "--out", str(tmp_path / "run"), "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "training", *words, "--workers", "0", "--threads", "1"],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert found["head"]["prototypes"] == 8
    assert found["batch_size"] == 2
    assert "for 10 images in batches of 2" in found["source"]
