"""Small runs that really collapse, each in its way: the warning comes while they go on and says what to change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.crops import CropSpec
from data.datasets import open_dataset
from tests.training.conftest import write_images
from training import watch
from training.loop import train
from training.recipe import Recipe
from training.recipes import RECIPES
from training.watch import PATIENCE, Alarm

STEPS = 45
DINO = RECIPES["smoke"]
PLAIN = CropSpec(
    global_px=32, local_px=32, n_local=1, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0), ratio=(1.0, 1.0),
    flip=0.0, jitter=0.0, gray=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
)  # fmt: skip
"""Views that are all the same."""


def changed(recipe: Recipe, step: dict[str, Any] | None = None, **optim: Any) -> Recipe:
    """The recipe with other constants, its steps counted as one epoch."""
    return replace(
        recipe,
        epochs=1,
        epoch_steps=STEPS,
        step=replace(recipe.step, **(step or {})),
        optim=replace(recipe.optim, warmup_epochs=0, **optim),
    )


COLLAPSES = {
    "one point": changed(DINO, optimizer="sgd", lr=300.0, momentum=(0.9, 0.9)),
    "a line": replace(changed(DINO), crops=PLAIN),
    "uniform": changed(DINO, teacher_temperature=(5.0, 5.0)),
    "one prototype": changed(DINO, {"center_momentum": 1.0}, teacher_temperature=(0.005, 0.005), lr=0.02),
    "nothing to learn": replace(
        changed(DINO, {"center_momentum": 1.0}, teacher_temperature=(0.1, 0.1), lr=1e-9, momentum=(1.0, 1.0)),
        crops=PLAIN,
    ),
    "centre": replace(
        changed(DINO, lr=1e4, weight_decay=(0.0, 0.0), momentum=(0.5, 0.5), freeze_last_layer_epochs=0),
        head=replace(DINO.head, freeze_magnitude=False),
    ),
}
SAID = {
    "one point": "features of different images are nearly equal",
    "a line": "features lie on a line",
    "uniform": "the teacher's targets are uniform",
    "one prototype": "the teacher's targets all fall on one prototype",
    "nothing to learn": "the student already says what the teacher says",
    "centre": "logits behind the teacher's targets grow without bound",
}


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files that show two different pictures."""
    root = write_images(tmp_path_factory.mktemp("two"), 2)
    for i in range(2, 10):
        (root / f"{i:02d}.jpg").write_bytes((root / f"{i % 2:02d}.jpg").read_bytes())
    return root


def notes(run: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["note"]["step"], line["note"]["text"]) for line in lines if "note" in line]


@pytest.mark.parametrize("kind", COLLAPSES)
def test_a_run_that_collapses_is_told_so_before_it_ends(
    kind: str, images: Path, two_kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(watch, "MIN_GRACE", 0)
    data = open_dataset(str(two_kinds if kind == "a line" else images))
    train(COLLAPSES[kind], data, tmp_path, recipe_name="x", source="x", revision="", workers=0)
    said = [(step, text) for step, text in notes(tmp_path) if text.startswith(f"collapse? {SAID[kind]}")]
    assert said, notes(tmp_path)
    assert said[0][0] < STEPS - 1, "while it goes on, not at the end of the epoch"
    assert any(word in said[0][1] for word in ("lower", "raise", "keep"))


def hear(alarm: Alarm, steps: range, warnings: dict[str, str]) -> list[tuple[int, str]]:
    return [(step, line) for step in steps for line in alarm.hear(step, warnings)]


def test_what_never_was_well_is_told_after_the_time_of_grace_and_what_was_well_at_once() -> None:
    alarm = Alarm(grace_steps=100, silence_steps=50)
    assert hear(alarm, range(0, 100, 10), {"uniform": "u"}) == []
    assert hear(alarm, range(100, 110, 10), {"uniform": "u"}) == [(100, "collapse? u")]
    early = Alarm(grace_steps=100, silence_steps=50)
    assert hear(early, range(10), {}) == []
    assert hear(early, range(10, 10 + PATIENCE), {"uniform": "u"}) == [(9 + PATIENCE, "collapse? u")]


def test_a_trouble_is_told_once_again_after_a_while_and_when_it_is_over() -> None:
    alarm = Alarm(grace_steps=0, silence_steps=50)
    told = hear(alarm, range(0, 90, 10), {"one point": "p", "uniform": "u"})
    assert told == [(20, "collapse? p"), (70, "collapse? p")], "only the root of it"
    assert hear(alarm, range(90, 100, 10), {}) == [(90, "the trouble of step 70 is over (one point)")]
    assert hear(alarm, range(100, 120, 10), {"uniform": "u"}) == [], "a look or two are nothing"
