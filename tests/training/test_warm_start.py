"""Runs that begin with weights that are there, and the high-resolution phase."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from backbones.checkpoints import load_backbone, save_backbone
from data.datasets import open_dataset
from data.errors import InputError
from training.command import RunOptions
from training.high_resolution import main, recipe_behind
from training.loop import Plan, train
from training.methods import make_state
from training.recipe import Recipe
from training.recipes import RECIPES
from training.run_folder import RunFolder
from training.run_log import read_steps
from training.warm_start import resize_table, warm_start_

WORDS = {"recipe_name": "smoke", "source": "test", "revision": "none"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["smoke", "smoke_dinov2"])
def run(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step an epoch."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(RECIPES[request.param], open_dataset(str(images)), folder, workers=0, **WORDS)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_read_back_from_a_run_folder_is_the_same(name: str) -> None:
    assert Recipe.from_json(json.loads(json.dumps(RECIPES[name].to_json()))) == RECIPES[name]


@pytest.mark.parametrize("values", [None, [], {}, {**RECIPES["smoke"].to_json(), "step": {"odd": 1}}])
def test_what_is_no_recipe_is_refused(values: object) -> None:
    with pytest.raises(InputError, match="train the run anew"):
        Recipe.from_json(values)


def test_a_table_is_resized_as_an_image_is() -> None:
    table = torch.randn(1, 1 + 16, 12)
    found = resize_table(table, 1 + 49)
    assert torch.equal(found[:, :1], table[:, :1]), "the CLS row stays"
    grid = table[:, 1:].view(1, 4, 4, 12).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (7, 7), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).view(1, 49, 12)
    torch.testing.assert_close(found[:, 1:], wanted, atol=1e-5, rtol=1e-4)


def test_the_phase_begins_where_the_run_ended(run: Path) -> None:
    """Student, teacher, heads and centres; only the position table is another."""
    first = Recipe.from_json(json.loads((run / "recipe.json").read_text())["recipe"])
    state = make_state(first.at_high_resolution(64, 1), CPU)
    warm_start_(state, str(run))
    saved = RunFolder(run).load_state()
    for network, weights in ((state.student, saved["student"]), (state.teacher, saved["teacher"])):
        found = network.state_dict()
        assert found.keys() == weights.keys()
        differing = {name for name in found if not torch.equal(found[name], weights[name])}
        assert differing == {"backbone.pos_embed"}
        assert found["backbone.pos_embed"].shape[1] == 1 + (64 // 8) ** 2
    assert all(torch.equal(center, saved["centers"][name]) for name, center in state.centers.items())


def test_a_backbone_goes_into_student_and_teacher_and_heads_start_fresh(run: Path) -> None:
    recipe = Recipe.from_json(json.loads((run / "recipe.json").read_text())["recipe"])
    torch.manual_seed(7)
    state = make_state(recipe, CPU)
    fresh = {name: p.clone() for name, p in state.student.named_parameters() if not name.startswith("backbone.")}
    warm_start_(state, str(run / "checkpoints" / "latest.safetensors"))
    wanted = load_backbone(run / "checkpoints" / "latest.safetensors").model.state_dict()
    for network in (state.student, state.teacher):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.backbone.state_dict().items())
    assert all(torch.equal(dict(state.student.named_parameters())[name], p) for name, p in fresh.items())


def test_a_backbone_without_mask_token_starts_dinov2(tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    recipe = RECIPES["smoke_dinov2"]
    plain = replace(RECIPES["smoke"], backbone=replace(recipe.backbone, mask_token=False), epochs=1)
    checkpoint = train(plain, open_dataset(str(images)), run, workers=0, **WORDS)
    state = make_state(recipe, CPU)
    token = state.student.backbone.mask_token.clone()
    warm_start_(state, str(checkpoint))
    assert torch.equal(state.student.backbone.mask_token, token)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 3}, r"has no weight blocks\.2\."),
        ({"depth": 1}, r"has a weight blocks\.1\."),
        ({"width": 24}, r"has shape"),
    ],
)
def test_weights_of_another_architecture_are_named(
    images: Path, tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    checkpoint = train(RECIPES["smoke"], open_dataset(str(images)), tmp_path / "run", workers=0, **WORDS)
    other = replace(RECIPES["smoke"], backbone=replace(RECIPES["smoke"].backbone, **changes))
    with pytest.raises(InputError, match=said):
        warm_start_(make_state(other, CPU), str(checkpoint))


def test_schedules_are_compressed_into_the_phase() -> None:
    first = RECIPES["dinov2_vitl14"]
    phase = first.at_high_resolution(518, 8)
    plan, whole = Plan(phase, 1250), Plan(first, 1250)
    assert plan.steps == 10_000
    for share in (0.1, 0.16, 0.5, 0.9):
        found, wanted = plan.at(round(share * plan.steps)), whole.at(round(share * whole.steps))
        assert found.lr == pytest.approx(0.35 * wanted.lr, rel=0.01, abs=1e-6), "the least rate is not lowered"
        assert found.weight_decay == pytest.approx(wanted.weight_decay, rel=0.01)
        assert found.momentum == pytest.approx(wanted.momentum, rel=0.001)
        assert found.teacher_temperature == pytest.approx(wanted.teacher_temperature, rel=0.01)
    assert phase.preprocess.size_px == 518


@pytest.mark.parametrize(("px", "said"), [(32, "want more than the 32 px"), (60, "no multiple of the patch of 8 px")])
def test_sizes_that_do_not_fit_are_refused(px: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        RECIPES["smoke"].at_high_resolution(px, 1)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_of_the_rate_that_would_not_descend_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="want a number above 0"):
        RECIPES["smoke"].at_high_resolution(64, 1, share)


def test_the_command_goes_on_with_a_run_and_resumes(run: Path, images: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ["--run", str(run), "--px", "64", "--epochs", "1", "--data", str(images), "--out", str(tmp_path / "large")]
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(
            [sys.executable, "-m", "training.high_resolution", *words, "--workers", "0", "--threads", "1"],
            cwd=repo_root,
            env={**os.environ, "PYTHONPATH": str(repo_root)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    found = load_backbone(tmp_path / "large" / "checkpoints" / "latest.safetensors")
    assert found.manifest.architecture["img_px"] == 64
    assert found.manifest.preprocess.size_px == 64
    assert len(read_steps(tmp_path / "large" / "log.jsonl")) == 1


def test_the_phase_also_continues_a_checkpoint_which_knows_its_recipe(run: Path, images: Path, tmp_path: Path) -> None:
    """Its heads start fresh, so they learn alone for the first tenth; the position table has the new size."""
    name, recipe = recipe_behind(str(run / "checkpoints" / "latest.safetensors"))
    assert recipe == Recipe.from_json(json.loads((run / "recipe.json").read_text())["recipe"])
    options = RunOptions(data=str(images), out=tmp_path / "large", workers=0, threads=1)
    main(str(run / "checkpoints" / "latest.safetensors"), 48, options, steps=3, freeze_backbone_steps=1)
    found = load_backbone(tmp_path / "large" / "checkpoints" / "latest.safetensors")
    assert found.manifest.architecture["img_px"] == 48
    assert found.manifest.step == 3
    resolved = json.loads((tmp_path / "large" / "recipe.json").read_text())
    assert resolved["name"] == f"{name} at 48 px"
    assert resolved["recipe"]["optim"]["freeze_backbone_steps"] == 1
    assert resolved["recipe"]["optim"]["lr"] == pytest.approx(0.35 * recipe.optim.lr)


def test_a_backbone_that_names_no_recipe_asks_for_one(run: Path, images: Path, tmp_path: Path) -> None:
    bare = load_backbone(run / "checkpoints" / "latest.safetensors")
    save_backbone(tmp_path / "bare.safetensors", bare.model, replace(bare.manifest, recipe=None))  # type: ignore[arg-type]
    options = RunOptions(data=str(images), out=tmp_path / "large", workers=0, threads=1)
    with pytest.raises(InputError, match="name one of its architecture with --recipe"):
        main(str(tmp_path / "bare.safetensors"), 48, options)
    with pytest.raises(InputError, match="--steps 0"):
        main(str(tmp_path / "bare.safetensors"), 48, options, recipe="smoke", steps=0)
