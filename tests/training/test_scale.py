"""Ways to compute a run that change nothing of what is learned: batches in parts, recomputed blocks, compiled blocks; and precisions."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones.checkpoints import load_backbone
from data.datasets import open_dataset
from data.errors import InputError
from training import projection_head, prototypes
from training.distillation import Schedule
from training.loop import train
from training.methods import make_state, take_step_
from training.recipe import Recipe
from training.recipes import RECIPES
from training.resume import everything
from training.run_folder import RunFolder
from training.scale import Scale, plain_backbone, spread_

WORDS = {"recipe_name": "smoke", "source": "test", "revision": "none"}
CPU = torch.device("cpu")
AT = Schedule(lr=0.1, weight_decay=0.01, momentum=0.9, teacher_temperature=0.05, freeze_last_layer=False)


def steady(name: str, drop_path: float = 0.0, **step: object) -> Recipe:
    """A recipe whose steps are continuous in the gradient (SGD)."""
    recipe = RECIPES[name]
    return replace(
        recipe,
        backbone=replace(recipe.backbone, drop_path=drop_path),
        step=replace(recipe.step, **step),
        optim=replace(recipe.optim, optimizer="sgd"),
    )


CASES = {
    "dino": steady("smoke"),
    "sinkhorn": steady("smoke_dinov2", targets="sinkhorn", koleo_weight=1.0),
    "centering": steady("smoke_dinov2", targets="centering", koleo_as="paper"),
}


def two_steps(recipe: Recipe, scale: Scale) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What two steps on the same eight images find, and all that the run then remembers; all in double precision.

    In single precision gradients that nearly cancel make rounding as large as what an error could change.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "float", Tensor.double)
        return _two_steps(recipe, scale)


def _two_steps(recipe: Recipe, scale: Scale) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    torch.manual_seed(0)
    state = make_state(recipe, CPU)
    spread_(state, recipe, scale)
    state.student.double()
    state.teacher.double()
    for center_K in state.centers.values():
        center_K.data = center_K.data.double()
    found = []
    for step in range(2):
        torch.manual_seed(step)
        crops = recipe.crops
        views = [torch.randn(8, 3, crops.view_px(i), crops.view_px(i)).double() for i in range(crops.n_views)]
        found.append(take_step_(state, views, AT, recipe, np.random.default_rng(step), True, scale.accumulate))
    return found, everything(state, 2)


def assert_same(recipe: Recipe, scale: Scale) -> None:
    for one, other in zip(two_steps(recipe, Scale()), two_steps(recipe, scale), strict=True):
        if isinstance(one, list):
            for record, its in zip(one, other, strict=True):
                assert record == pytest.approx(its, rel=1e-9, abs=1e-11)
        else:
            torch.testing.assert_close(other, one, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_in_parts_is_the_whole_batch(name: str, parts: int) -> None:
    """Targets, centres and KoLeo are those of eight images, also in parts of two, and so are all gradients."""
    assert_same(CASES[name], Scale(accumulate=parts))


def test_koleo_of_parts_alone_would_be_another() -> None:
    """Else the test above could not tell."""
    recipe = CASES["sinkhorn"]
    whole, _ = two_steps(recipe, Scale())
    torch.manual_seed(0)
    state = make_state(recipe, CPU)
    torch.manual_seed(0)
    crops = recipe.crops
    views = [torch.randn(8, 3, crops.view_px(i), crops.view_px(i))[:2] for i in range(crops.n_views)]
    part = take_step_(state, views, AT, recipe, np.random.default_rng(0))
    assert abs(part["koleo"] - whole[0]["koleo"]) > 0.1


def test_with_stochastic_depth_both_passes_of_a_part_drop_the_same_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """KoLeo's gradient belongs to the very features that it was computed of."""
    from training import dinov2

    seen: list[Tensor] = []
    encode = dinov2.Dinov2Learner.encode

    def noted(self: dinov2.Dinov2Learner, *asked: Any) -> object:
        found = encode(self, *asked)
        if self.training and next(self.parameters()).requires_grad:
            seen.append(found[0].detach()[:8])
        return found

    monkeypatch.setattr(dinov2.Dinov2Learner, "encode", noted)
    two_steps(steady("smoke_dinov2", drop_path=0.5), Scale(accumulate=2))
    first, second, again_first, again_second = seen[:4]
    torch.testing.assert_close(again_first, first)
    torch.testing.assert_close(again_second, second)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_are_computed_again_give_the_same(name: str) -> None:
    for drop_path in (0.0, 0.5):
        recipe = replace(CASES[name], backbone=replace(CASES[name].backbone, drop_path=drop_path))
        assert_same(recipe, Scale(checkpoint_blocks=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_give_the_same(name: str) -> None:
    assert_same(CASES[name], Scale(compile_blocks=True))
    assert_same(CASES[name], Scale(compile_blocks=True, checkpoint_blocks=True, accumulate=2))


def test_a_plain_copy_of_the_teacher_is_free_of_what_was_done_to_its_blocks() -> None:
    recipe = CASES["sinkhorn"]
    state = make_state(recipe, CPU)
    pixels = torch.randn(1, 3, 32, 32)
    wanted = state.teacher.backbone.eval()(pixels)
    spread_(state, recipe, Scale(checkpoint_blocks=True))
    copy = plain_backbone(state.teacher)
    with torch.no_grad():
        next(iter(state.teacher.parameters())).add_(1)
    torch.testing.assert_close(copy(pixels), wanted.detach())


def test_prototypes_in_chunks_give_the_loss_and_gradients_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototypes, "CHUNK_ELEMENTS", 3 * 7)
    monkeypatch.setattr(prototypes, "CACHED_ELEMENTS", 2 * 7)
    generator = torch.Generator().manual_seed(0)
    z, w, t, a = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((10, 4), (7, 4), (10, 7), (10,)))
    t = 2 * t.softmax(dim=1)
    found = []
    for chunked in (True, False):
        z_RE, w_KE = z.clone().requires_grad_(), w.clone().requires_grad_()
        if chunked:
            loss, rows = prototypes.prototype_cross_entropy(z_RE, w_KE, prototypes.copied_rows(t), a, 0.1)
        else:
            rows = -(t * (z_RE @ w_KE.T / 0.1).log_softmax(dim=1)).sum(dim=1) * a
            loss = rows.sum()
        (3 * loss).backward()
        found.append([loss.detach(), rows.detach(), z_RE.grad, w_KE.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("bf16", "smoke_dinov2"),
        ("fp16", "smoke"),
        pytest.param("bf16", "smoke", marks=pytest.mark.slow),
        pytest.param("fp16", "smoke_dinov2", marks=pytest.mark.slow),
    ],
)
def test_narrow_precisions_learn_about_the_same_and_resume_exactly(
    name: str, precision: str, images: Path, tmp_path: Path
) -> None:
    exact, data = RECIPES[name], open_dataset(str(images))
    recipe = replace(exact, step=replace(exact.step, precision=precision))
    torch.manual_seed(0)
    views = [torch.randn(8, 3, exact.crops.view_px(i), exact.crops.view_px(i)) for i in range(exact.crops.n_views)]
    found = []
    for one in (exact, recipe):
        torch.manual_seed(0)
        state = make_state(one, CPU)
        found.append(take_step_(state, views, AT, one, np.random.default_rng(0)))
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=0.02)
    assert found[1]["loss"] != found[0]["loss"]
    whole = train(recipe, data, tmp_path / "whole", workers=0, **WORDS)
    train(recipe, data, tmp_path / "parts", workers=0, stop_at_step=1, **WORDS)
    assert ("scaler" in RunFolder(tmp_path / "parts").load_state()) == (precision == "fp16")
    parts = train(recipe, data, tmp_path / "parts", workers=0, **WORDS)
    assert load_backbone(whole).manifest.weights_sha256 == load_backbone(parts).manifest.weights_sha256


def test_float16_gradients_that_overflow_change_nothing_but_the_scale() -> None:
    recipe = steady("smoke", precision="fp16")
    torch.manual_seed(0)
    state = make_state(recipe, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.clone() for name, p in state.student.named_parameters()}
    views = [torch.randn(4, 3, px, px) for px in (32, 32, 16, 16)]
    found = take_step_(state, views, AT, recipe, np.random.default_rng(0))
    assert found["loss_scale"] == 2.0**40
    assert np.isfinite(list(found.values())).all()
    assert state.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in state.student.named_parameters())
    for _ in range(40):
        found = take_step_(state, views, AT, recipe, np.random.default_rng(0))
    assert "grad_norm" in found
    assert not all(torch.equal(p, before[name]) for name, p in state.student.named_parameters())


def test_a_batch_that_does_not_divide_into_parts_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--accumulate 3: 8 images do not divide"):
        train(CASES["dino"], open_dataset(str(images)), tmp_path / "run", scale=Scale(accumulate=3), **WORDS)


def test_a_disk_that_fills_up_ends_in_one_line_and_keeps_what_was_saved(
    images: Path, tmp_path: Path, repo_root: Path
) -> None:
    """A limit on the size of files stands in for the disk: the state of the second save does not fit."""
    data, out = open_dataset(str(images)), tmp_path / "run"
    train(RECIPES["smoke"], data, out, workers=0, stop_at_step=1, **WORDS)
    (kept,) = RunFolder(out).states.complete()
    program = (
        "import resource, sys, torch; from pathlib import Path; from data.errors import run_cli\n"
        "from data.datasets import open_dataset; from training.loop import train; from training.recipes import RECIPES\n"
        "torch.set_num_threads(1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        f"run_cli(lambda: train(RECIPES['smoke'], open_dataset({str(images)!r}), Path({str(out)!r}), workers=0, **{WORDS!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert "cannot be written (File too large" in last
    assert "Traceback" not in done.stderr
    assert RunFolder(out).states.newest_sound() == kept
    assert not (out / "state" / ".part").exists()
    parts = train(RECIPES["smoke"], data, out, workers=0, **WORDS)
    whole = train(RECIPES["smoke"], data, tmp_path / "whole", workers=0, **WORDS)
    assert load_backbone(whole).manifest.weights_sha256 == load_backbone(parts).manifest.weights_sha256


def test_a_run_killed_at_any_moment_ends_with_the_bits_of_an_uninterrupted_one(
    images: Path, tmp_path: Path, repo_root: Path
) -> None:
    """SIGKILL again and again, at moments drawn at random, while states are being written at every step."""
    words = ["--recipe", "smoke_dinov2", "--data", str(images), "--workers", "0", "--threads", "1", "--epochs", "16"]
    env = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    killed, rng = RunFolder(tmp_path / "killed"), np.random.default_rng(0)
    command = [sys.executable, "-m", "training", *words, "--out"]
    for _ in range(2):
        known = killed.states.complete()
        process = subprocess.Popen([*command, str(killed.path)], cwd=repo_root, env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while killed.states.complete() == known and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.2)))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was still at work"
    subprocess.run([*command, str(killed.path)], cwd=repo_root, env=env, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, str(tmp_path / "whole")], cwd=repo_root, env=env, check=True, stdout=subprocess.DEVNULL)
    one, other = (RunFolder(tmp_path / name).load_state() for name in ("killed", "whole"))
    for kind in ("student", "teacher", "centers", "optimizer"):
        assert all(torch.equal(other[kind][name], tensor) for name, tensor in one[kind].items()), kind


def test_the_prototypes_and_their_gradients_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, the last ones fewer; oracle: autograd."""
    monkeypatch.setattr(projection_head._WeightNorm, "ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    v, g, along = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (7, 1), (7, 4)))
    found = []
    for formula in (projection_head._WeightNorm.apply, lambda v, g: v * (g / v.norm(dim=1, keepdim=True))):
        v_KE, g_K1 = v.clone().requires_grad_(), g.clone().requires_grad_()
        weight_KE = formula(v_KE, g_K1)
        (weight_KE * along).sum().backward()
        found.append([weight_KE.detach(), v_KE.grad, g_K1.grad])
    torch.testing.assert_close(*found)
