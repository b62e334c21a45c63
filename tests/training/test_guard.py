"""Continuing good weights: heads learn alone first, k-NN guards what was there, and the run resumes exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbones.checkpoints import load_backbone
from data.datasets import open_dataset
from data.errors import CheckFailed, InputError
from training.guard import Guard
from training.loop import train
from training.methods import make_state
from training.plan import Plan
from training.recipe import Recipe
from training.recipes import RECIPES
from training.run_folder import RunFolder
from training.run_log import NoLog
from training.warm_start import warming_heads

WORDS = {"recipe_name": "smoke", "source": "test", "revision": "none", "workers": 0}
METHODS = ("smoke", "smoke_dinov2")


def recipe_of(name: str, lr: float | None = None, epochs: int = 6) -> Recipe:
    recipe = replace(RECIPES[name], epochs=epochs)
    return recipe if lr is None else replace(recipe, optim=replace(recipe.optim, lr=lr, lr_batch=8, lr_rule="linear"))


@pytest.fixture(scope="module", params=METHODS)
def first(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of one step an epoch, whose backbone is gone on with."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(RECIPES[request.param], open_dataset(str(images)), folder, **WORDS)
    return request.param, folder / "checkpoints" / "latest.safetensors"


def test_the_backbone_keeps_its_bits_until_its_heads_are_warm_and_the_run_resumes_exactly(
    first: tuple[str, Path], images: Path, tmp_path: Path
) -> None:
    name, backbone = first
    data, recipe = open_dataset(str(images)), recipe_of(name)
    words = {**WORDS, "init": str(backbone), "freeze_backbone_steps": 3}
    start = load_backbone(backbone).model.state_dict()

    def at_step(step: int, out: str) -> dict[str, torch.Tensor]:
        train(recipe, data, tmp_path / out, stop_at_step=step, **words)
        state = RunFolder(tmp_path / out).load_state()
        return {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in state[who].items()}

    warm = at_step(3, "parts")
    for who in ("student", "teacher"):
        assert all(torch.equal(warm[f"{who}.backbone.{name}"], tensor) for name, tensor in start.items())
    fresh = make_state(recipe, torch.device("cpu")).student.state_dict()
    heads = [name for name in fresh if not name.startswith("backbone.") and name.endswith("mlp.0.weight")]
    assert heads
    later = at_step(6, "parts")
    assert not torch.equal(later["student.backbone.blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(later[f"student.{heads[0]}"], warm[f"student.{heads[0]}"])
    whole = at_step(6, "whole")
    assert all(torch.equal(tensor, later[name]) for name, tensor in whole.items())


def test_all_schedules_begin_when_the_heads_are_warm() -> None:
    recipe = recipe_of("smoke", epochs=20)
    late = replace(recipe, epochs=21, optim=replace(recipe.optim, freeze_backbone_steps=10))
    plain, shifted = Plan(recipe, 10), Plan(late, 10)
    for step in (0, 5, 10, 100, 199):
        one, other = plain.at(step), shifted.at(step + 10)
        assert (one.lr, one.momentum, one.weight_decay) == (other.lr, other.momentum, other.weight_decay)
        assert not other.freeze_backbone
    assert all(shifted.at(step).freeze_backbone for step in range(10))
    assert shifted.at(5).lr == pytest.approx(shifted.peak)


@pytest.mark.parametrize(("steps", "wanted", "found"), [(500, None, 50), (10**6, None, 1000), (500, 7, 7), (500, 0, 0)])
def test_heads_of_a_backbone_learn_alone_for_a_tenth_of_the_run(steps: int, wanted: int | None, found: int) -> None:
    assert warming_heads(RECIPES["smoke"], "dinov2_vits14", steps, wanted).optim.freeze_backbone_steps == found


def test_a_run_brings_its_heads(first: tuple[str, Path]) -> None:
    run = first[1].parents[1]
    assert warming_heads(RECIPES["smoke"], str(run), 500, None).optim.freeze_backbone_steps == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"freeze_backbone_steps": 2}, "is for --init"),
        ({"freeze_backbone_steps": 6, "init": "{backbone}"}, "fewer than the 6 steps"),
        ({"freeze_backbone_steps": -1, "init": "{backbone}"}, "at least 0"),
    ],
)
def test_lengths_that_cannot_be_are_refused(
    first: tuple[str, Path], images: Path, tmp_path: Path, words: dict[str, object], said: str
) -> None:
    given = {k: str(first[1]) if v == "{backbone}" else v for k, v in words.items()}
    with pytest.raises(InputError, match=said):
        train(recipe_of(first[0]), open_dataset(str(images)), tmp_path / "run", **WORDS, **given)  # type: ignore[arg-type]


class TestGuard:
    def guard(self, folder: Path) -> Guard:
        folder.mkdir(exist_ok=True)
        return Guard(RunFolder(folder), NoLog())

    def test_two_measurements_in_a_row_below_nine_tenths_end_the_run(self, tmp_path: Path) -> None:
        guard = self.guard(tmp_path / "run")
        assert [guard.see(step, top1) for step, top1 in ((0, 0.5), (1, 0.6), (2, 0.44), (3, 0.5))] == [
            True,
            True,
            False,
            False,
        ]
        guard.see(4, 0.4)
        with pytest.raises(
            CheckFailed, match=r"from 0\.5000 at the start to 0\.3000 after step 5.*best, of step 1 \(0\.6000\)"
        ):
            guard.see(5, 0.3)

    def test_a_resumed_run_remembers_its_start_and_forgets_what_it_repeats(self, tmp_path: Path) -> None:
        guard = self.guard(tmp_path / "run")
        for step, top1 in ((0, 0.5), (1, 0.55), (2, 0.9)):
            guard.see(step, top1)
        again = self.guard(tmp_path / "run")
        again.begin(1)
        assert again.seen == {0: 0.5, 1: 0.55}
        assert again.see(2, 0.6), "better than what is left"


@pytest.fixture(scope="module")
def labelled(images: Path) -> str:
    """The bundled sample images, of 16 real kinds."""
    return str(Path(__file__).parents[2] / "samples" / "samples.csv")


@pytest.mark.parametrize(("lr", "harmful"), [(1e-5, False), (3.0, True)])
def test_k_nn_guards_the_bundled_backbone_against_a_harmful_learning_rate_only(
    images: Path,
    labelled: str,
    tmp_path: Path,
    repo_root: Path,
    lr: float,
    harmful: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real weights, real images: a sane rate leaves their neighbours alone, an absurd one ends the run and keeps the best."""
    bundled = repo_root / "models" / "dinoscope_tiny.safetensors"
    recipe = RECIPES["dino_tiny_small_data"]
    recipe = replace(
        recipe,
        head=replace(recipe.head, prototypes=32, hidden=32, bottleneck=16),
        crops=replace(recipe.crops, n_local=1),
        optim=replace(recipe.optim, lr=lr, lr_batch=4, warmup_epochs=0, momentum=(0.0, 0.0)),
        step=replace(recipe.step, precision="fp32", clip_norm=0.0),
        batch_size=4,
        epochs=2,
    )
    words = {**WORDS, "init": str(bundled), "freeze_backbone_steps": 1, "eval_data": labelled}
    run = tmp_path / "run"
    if not harmful:
        train(recipe, open_dataset(str(images)), run, **words)  # type: ignore[arg-type]
        assert "fell from" not in capsys.readouterr().err
        return
    with pytest.raises(CheckFailed, match="lower the learning rate"):
        train(recipe, open_dataset(str(images)), run, **words)  # type: ignore[arg-type]
    seen = {int(k): v for k, v in json.loads((run / "guard.json").read_text()).items()}
    assert seen[4] < 0.9 * seen[0]
    best = load_backbone(run / "checkpoints" / "best.safetensors")
    assert best.manifest.step == max(seen, key=lambda step: seen[step]) or seen[best.manifest.step] == max(
        seen.values()
    )
