"""What would spoil a run is noticed while it goes on: steps that are not finite, with their terms and images."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.checkpoints import load_backbone
from backbones.resnet import ResNetSpec
from data.datasets import open_dataset
from data.errors import CheckFailed
from data.loader import ViewLoader, Views
from tests.training.test_parallel import start_two
from training import dinov2, watch
from training.dinov2 import Dinov2Spec
from training.loop import Plan, train
from training.methods import make_state, take_step_
from training.recipe import OptimSpec, Recipe
from training.recipes import RECIPES
from training.run_log import read_steps
from training.speed import step_flops

WORDS = {"recipe_name": "smoke", "source": "test", "revision": "abc123", "workers": 0}
BAD = float("nan")


def bad_lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "nan.jsonl").read_text().splitlines()]


def everything(state: object) -> list[torch.Tensor]:
    """Copies of all tensors that a step may change."""
    tensors = [*state.student.state_dict().values(), *state.teacher.state_dict().values(), *state.centers.values()]  # type: ignore[attr-defined]
    moments = [value for one in state.optimizer.state.values() for value in one.values() if torch.is_tensor(value)]  # type: ignore[attr-defined]
    return [tensor.clone() for tensor in [*tensors, *moments]]


def a_batch(images: Path, recipe: Recipe) -> Views:
    return next(iter(ViewLoader(open_dataset(str(images)), recipe.crops, recipe.batch_size).epoch(0)))


def spoil_term(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """KoLeo gives NaN at these calls, two of which make a step."""
    whole, made = dinov2.koleo_loss, [0]

    def koleo(features: torch.Tensor) -> torch.Tensor:
        made[0] += 1
        return whole(features) * (BAD if made[0] in calls else 1.0)

    monkeypatch.setattr(dinov2, "koleo_loss", koleo)


def spoil_image(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One image of the data has NaN in the second view, in whichever process shows it."""
    whole: Callable[..., object] = ViewLoader.epoch

    def epoch(self: ViewLoader, *args: int) -> object:
        for views in whole(self, *args):  # type: ignore[attr-defined]
            for i, shown in enumerate(views.names):
                if shown == name:
                    views[1][i, 0, 3, 3] = BAD
            yield views

    monkeypatch.setattr(ViewLoader, "epoch", epoch)


def test_a_term_that_is_not_finite_is_named_and_its_step_skipped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_term(monkeypatch, {3})
    run = tmp_path / "run"
    checkpoint = train(replace(RECIPES["smoke_dinov2"], epochs=4), open_dataset(str(images)), run, **WORDS)
    (line,) = bad_lines(run)
    assert line["step"] == 1
    assert {"loss", "koleo"} <= set(line["not_finite"])  # type: ignore[arg-type]
    assert not {"ibot", "dino_local"} & set(line["not_finite"])  # type: ignore[arg-type]
    assert line["suspects"] == []
    assert len(line["batch"]) == 8  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "step 1: loss, koleo not finite" in said
    assert "nan.jsonl" in said
    losses = [record["loss"] for record in read_steps(run / "log.jsonl")]
    assert losses[1] is None
    assert all(math.isfinite(loss) for loss in (losses[0], *losses[2:])), "the run goes on"
    assert all(torch.isfinite(value).all() for value in load_backbone(checkpoint).model.state_dict().values())


@pytest.mark.parametrize("name", ["smoke", "smoke_dinov2"])
def test_the_image_that_makes_a_step_not_finite_is_named(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_image(monkeypatch, "04.jpg")
    run = tmp_path / "run"
    train(replace(RECIPES[name], epochs=3), open_dataset(str(images)), run, **WORDS)
    lines = bad_lines(run)
    assert lines
    for line in lines:
        assert line["suspects"] == ["04.jpg"]
        assert "04.jpg" in line["batch"]  # type: ignore[operator]
    assert "not finite (images 04.jpg)" in capsys.readouterr().err


TWO = """
import sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from data.datasets import open_dataset
from tests.training.test_watch import WORDS, spoil_image
from training import parallel
from training.loop import train
from training.recipes import RECIPES

torch.set_num_threads(1)
with pytest.MonkeyPatch.context() as patch, parallel.joined(torch.device("cpu")) as device:
    spoil_image(patch, "04.jpg")
    recipe = replace(RECIPES["smoke_dinov2"], epochs=3)
    train(recipe, open_dataset(sys.argv[1]), Path(sys.argv[2]), device=device, **WORDS)
"""


def test_several_processes_agree_that_a_step_is_bad_and_name_the_image_of_one(
    images: Path, tmp_path: Path, repo_root: Path
) -> None:
    run = tmp_path / "run"
    for process in start_two(repo_root, "-c", TWO, str(images), str(run)):
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    lines = bad_lines(run)
    assert lines
    assert all(line["suspects"] == ["04.jpg"] and len(line["batch"]) == 8 for line in lines)  # type: ignore[arg-type]
    losses = [record["loss"] for record in read_steps(run / "log.jsonl")]
    assert [step for step, loss in enumerate(losses) if loss is None] == [line["step"] for line in lines]


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["smoke"],
        RECIPES["smoke_dinov2"],
        replace(RECIPES["smoke_dinov2"], step=replace(RECIPES["smoke_dinov2"].step, targets="centering")),
        replace(RECIPES["smoke"], backbone=ResNetSpec(), optim=OptimSpec(optimizer="sgd", lr=0.03)),
    ],
    ids=["dino", "sinkhorn", "centering", "resnet"],
)
@pytest.mark.parametrize("spoilt", ["pixel", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(recipe: Recipe, spoilt: str, images: Path) -> None:
    torch.manual_seed(0)
    state, views = make_state(recipe, torch.device("cpu")), a_batch(images, recipe)
    at = Plan(recipe, 4).at(3)
    take_step_(state, views, at, recipe, np.random.default_rng(0))
    before = everything(state)
    if spoilt == "pixel":
        views[0][3, 0, 0, 0] = BAD
    else:
        # finite forward, NaN backward
        parameter = next(p for p in state.student.backbone.parameters() if p.ndim > 1)
        parameter.register_hook(lambda gradient: gradient * BAD)
    found = take_step_(state, views, at, recipe, np.random.default_rng(1))
    assert math.isfinite(found["loss"]) == (spoilt == "gradient")
    assert not all(math.isfinite(value) for name, value in found.items() if name.startswith("grad_norm"))
    for value, wanted in zip(everything(state), before, strict=True):
        assert torch.equal(value, wanted)


def test_too_many_bad_steps_end_the_run_and_leave_the_saved_state(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = replace(RECIPES["smoke_dinov2"], epochs=20), tmp_path / "run"
    spoil_term(monkeypatch, set(range(7, 100)))
    with pytest.raises(CheckFailed, match=r"5 steps in a row .* last step 7 \(loss, koleo"):
        train(recipe, open_dataset(str(images)), run, **WORDS)
    assert [line["step"] for line in bad_lines(run)] == [3, 4, 5, 6, 7]
    monkeypatch.undo()
    train(recipe, open_dataset(str(images)), run, stop_at_step=10, **WORDS)
    assert read_steps(run / "log.jsonl")[-1]["step"] == 9


def test_without_the_loss_of_cls_tokens_every_step_is_finite(images: Path, tmp_path: Path) -> None:
    """What is watched of CLS tokens is told where it exists; that it does not is no fault of a step."""
    recipe = RECIPES["smoke_dinov2"]
    assert isinstance(recipe.step, Dinov2Spec)
    alone = replace(recipe, step=replace(recipe.step, dino_weight=0.0), epochs=1)
    train(alone, open_dataset(str(images)), tmp_path / "run", **WORDS)
    assert not (tmp_path / "run" / "nan.jsonl").exists()
    assert all("kl_nats" not in step for step in read_steps(tmp_path / "run" / "log.jsonl"))


def test_weights_that_are_not_finite_never_replace_saved_ones(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = replace(RECIPES["smoke"], epochs=4), tmp_path / "run"
    train(recipe, open_dataset(str(images)), run, stop_at_step=1, **WORDS)
    saved = [run / "checkpoints" / "latest.safetensors", *sorted((run / "state").glob("*/*"))]
    before = [path.read_bytes() for path in saved]
    whole = watch.Watch.see

    def see(self: watch.Watch, step: int, found: object, state: object, views: Views) -> None:
        whole(self, step, found, state, views)  # type: ignore[arg-type]
        with torch.no_grad():
            next(state.student.parameters()).fill_(BAD)  # type: ignore[attr-defined]

    monkeypatch.setattr(watch.Watch, "see", see)
    with pytest.raises(CheckFailed, match="weights are not finite and are not saved"):
        train(recipe, open_dataset(str(images)), run, **WORDS)
    assert before == [path.read_bytes() for path in saved]


def test_the_log_begins_with_the_recipe_and_the_source_revision(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for end in (1, None):
        train(RECIPES["smoke"], open_dataset(str(images)), run, stop_at_step=end, **WORDS)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert Recipe.from_json(lines[0]["start"]["recipe"]) == RECIPES["smoke"]
    assert (lines[0]["start"]["revision"], lines[0]["start"]["source"]) == ("abc123", "test")
    assert lines[0]["start"]["model_flops_per_step"] == step_flops(RECIPES["smoke"])
    assert lines[0]["start"]["peak_from"] == "measured product"
    assert [line["start"]["step"] if "start" in line else line["step"] for line in lines] == [0, 0, 1, 1]
