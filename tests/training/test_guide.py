"""Distillation from the frozen teacher of another run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.checkpoints import load_backbone
from backbones.vit import ViTSpec
from data.datasets import open_dataset
from data.errors import InputError
from training import high_resolution
from training.command import RunOptions
from training.distillation import Schedule
from training.guides import learn_from
from training.loop import train
from training.methods import make_state, take_step_
from training.recipe import Recipe
from training.recipes import RECIPES
from training.run_folder import RunFolder
from training.warm_start import frozen_teacher

WORDS = {"recipe_name": "small", "source": "test", "revision": "none"}
CPU = torch.device("cpu")
LARGE = RECIPES["smoke_dinov2"]
SMALL = replace(LARGE, backbone=replace(LARGE.backbone, width=24, drop_path=0.0))


@pytest.fixture(scope="module")
def large(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the larger backbone."""
    folder = tmp_path_factory.mktemp("large") / "run"
    train(LARGE, open_dataset(str(images)), folder, workers=0, **WORDS)
    return folder


def test_the_guide_is_the_runs_teacher(large: Path) -> None:
    guide = frozen_teacher(str(large), SMALL, CPU)
    saved = RunFolder(large).load_state()["teacher"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in guide.state_dict().items())
    assert not any(p.requires_grad for p in guide.parameters())


def test_the_student_learns_what_the_guide_says(large: Path) -> None:
    """On the same views again and again its predictions come to the guide's targets, while the guide stays as it was."""
    recipe = replace(SMALL, step=replace(SMALL.step, targets="centering", center_momentum=1.0, koleo_weight=0.0))
    torch.manual_seed(0)
    state = make_state(recipe, CPU)
    # strong weights, so that the guide tells the images apart
    guide = frozen_teacher(str(large), recipe, CPU)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    state.guide = guide
    before = {name: p.clone() for name, p in guide.named_parameters()}
    views = [torch.randn(6, 3, side, side) for side in (32, 32, 16)]
    at = Schedule(lr=5e-3, weight_decay=0.0, momentum=0.9, teacher_temperature=0.1, freeze_last_layer=False)
    steps = [take_step_(state, views, at, recipe, np.random.default_rng(0)) for _ in range(80)]
    assert steps[-1]["kl_nats"] < 0.5 * steps[0]["kl_nats"]
    assert steps[-1]["ibot"] < steps[0]["ibot"]
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_no_patch_is_hidden_and_every_patch_is_compared(large: Path) -> None:
    """So the ratio of masked patches is without effect, and the mask token takes no gradient."""
    found = []
    for ratio in ((0.1, 0.2), (0.4, 0.5)):
        recipe = replace(SMALL, step=replace(SMALL.step, masks=replace(SMALL.step.masks, ratio=ratio)))
        torch.manual_seed(0)
        state = make_state(recipe, CPU)
        state.guide = frozen_teacher(str(large), recipe, CPU)
        views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)]
        at = Schedule(lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temperature=0.1, freeze_last_layer=False)
        found.append(take_step_(state, views, at, recipe, np.random.default_rng(0)))
        assert state.student.backbone.mask_token.grad is None
    assert found[0] == found[1]


def test_a_student_drops_no_paths_whatever_its_recipe_would_alone(large: Path) -> None:
    (fitted,), _ = learn_from(str(large), [LARGE], CPU)
    assert isinstance(fitted.backbone, ViTSpec)
    assert LARGE.backbone.drop_path > 0 == fitted.backbone.drop_path


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_the_teacher_that_it_began_with_or_without_one(
    first: bool, large: Path, images: Path, tmp_path: Path
) -> None:
    """The same recipe is another run without its teacher: its own targets would be learned in place of the teacher's."""
    data, teachers = open_dataset(str(images)), [str(large), None]
    before, after = teachers if first else teachers[::-1]
    train(SMALL, data, tmp_path / "run", workers=0, stop_at_step=1, teacher=before, **WORDS)
    with pytest.raises(InputError, match="holds a run with another teacher; go on with the same"):
        train(SMALL, data, tmp_path / "run", workers=0, teacher=after, **WORDS)


def test_a_distilled_run_resumes_exactly_and_its_result_is_small(large: Path, images: Path, tmp_path: Path) -> None:
    data, words = open_dataset(str(images)), {**WORDS, "teacher": str(large)}
    whole = train(SMALL, data, tmp_path / "whole", workers=0, **words)
    train(SMALL, data, tmp_path / "parts", workers=0, stop_at_step=1, **words)
    parts = train(SMALL, data, tmp_path / "parts", workers=0, **words)
    one, other = load_backbone(whole), load_backbone(parts)
    assert one.manifest.weights_sha256 == other.manifest.weights_sha256
    assert one.model.embed_dim == 24
    assert json.loads((tmp_path / "whole" / "recipe.json").read_text())["teacher"]["run"] == str(large)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (replace(SMALL, head=replace(SMALL.head, prototypes=32)), "has prototypes 64, the recipe 32"),
        (
            replace(SMALL, backbone=replace(SMALL.backbone, patch_px=16)),
            "has patches of px 8, the recipe 16",
        ),
        (RECIPES["smoke"], "the recipe is a DINOv1 run"),
    ],
)
def test_a_recipe_that_does_not_fit_the_teacher_is_refused(large: Path, recipe: Recipe, said: str) -> None:
    with pytest.raises(InputError, match=said):
        frozen_teacher(str(large), recipe, CPU)


def test_a_backbone_without_heads_is_refused(large: Path) -> None:
    with pytest.raises(InputError, match="no heads to learn from"):
        frozen_teacher(str(large / "checkpoints" / "latest.safetensors"), SMALL, CPU)


def test_a_high_resolution_phase_of_a_guided_run_is_guided(large: Path, images: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "phase"
    train(SMALL, open_dataset(str(images)), first, workers=0, teacher=str(large), **WORDS)
    options = RunOptions(data=str(images), out=out, workers=0, threads=1)
    with pytest.raises(InputError, match=r"learned from the teacher .* with --teacher"):
        high_resolution.main(str(first), 64, options, epochs=1)
    assert not out.exists()
    high_resolution.main(str(first), 64, options, epochs=1, teacher=str(large))
    assert load_backbone(out / "checkpoints" / "latest.safetensors").manifest.architecture["img_px"] == 64
    assert json.loads((out / "recipe.json").read_text())["teacher"]["run"] == str(large)
