"""Distillation of features from backbones without heads, of another patch, width, kind or engine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones.checkpoints import Manifest, load_backbone, save_backbone
from backbones.resnet import ResNetSpec
from backbones.vit import ViT, ViTSpec
from data.datasets import open_dataset
from data.errors import InputError
from data.preprocess import Preprocess
from exports.to_onnx import export_onnx
from training import high_resolution
from training.command import RunOptions
from training.distillation import Schedule
from training.feature_distillation import FeatureSpec, FeatureTeacher, Said, feature_losses
from training.guides import as_feature_student, learn_from
from training.loop import train
from training.methods import make_state, take_step_
from training.recipes import RECIPES
from training.run_log import read_steps

CPU = torch.device("cpu")
WORDS = {"recipe_name": "student", "source": "test", "revision": "none"}
AT = Schedule(lr=2e-3, weight_decay=0.0, momentum=0.9, teacher_temperature=0.1, freeze_last_layer=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of patch 14 and width 36 with strong weights, so that it tells images apart."""
    torch.manual_seed(0)
    model = ViT(ViTSpec(patch_px=14, width=36, depth=2, heads=3, img_px=42))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_backbone(path, model, Manifest(architecture={}, preprocess=Preprocess(size_px=42, resize_px=42, whole_px=42)))
    return path


def test_the_loss_is_smooth_l1_between_normalised_features_on_the_students_grid() -> None:
    """By hand, in NumPy; equal features cost nothing, whatever the teacher's scale."""
    rng = np.random.default_rng(0)
    cls, wanted = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    patches = rng.normal(size=(2, 4, 5))
    gap = np.abs(cls - wanted)
    by_hand = np.where(gap < 2.0, gap**2 / 4.0, gap - 1.0).mean()
    said = Said(torch.tensor(wanted), torch.tensor(patches).transpose(1, 2).unflatten(2, (2, 2)))
    found = feature_losses(torch.tensor(cls), torch.tensor(patches), said)
    assert found[0].item() == pytest.approx(by_hand)
    assert found[1].item() == 0.0
    flat = Said(torch.tensor(wanted), torch.ones(2, 5, 3, 3, dtype=torch.float64))
    assert feature_losses(torch.tensor(cls), torch.ones(2, 4, 5, dtype=torch.float64), flat)[1].item() == pytest.approx(
        0
    )


def test_the_teacher_says_what_its_network_says_normalised(teacher: Path) -> None:
    view = torch.randn(2, 3, 42, 42)
    said = FeatureTeacher(str(teacher), CPU).says([view])[0]
    with torch.no_grad():
        features = load_backbone(teacher).model.features(view)
    torch.testing.assert_close(said.cls_BE, F.layer_norm(features.cls, (36,)))
    torch.testing.assert_close(said.patches_BEhw.flatten(2).transpose(1, 2), F.layer_norm(features.patches, (36,)))
    assert said.patches_BEhw.shape == (2, 36, 3, 3)


def test_views_that_are_no_whole_patches_are_resized_for_the_teacher(teacher: Path) -> None:
    said = FeatureTeacher(str(teacher), CPU).says([torch.randn(1, 3, 32, 32)])[0]
    assert said.patches_BEhw.shape[2:] == (2, 2)


def test_a_teacher_of_other_statistics_sees_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViT(ViTSpec(patch_px=8, width=12, depth=1, heads=3, img_px=16))
    seen = Preprocess(size_px=16, resize_px=16, whole_px=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    save_backbone(tmp_path / "t.safetensors", model, Manifest(architecture={}, preprocess=seen))
    pixels = torch.rand(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (Preprocess().mean, Preprocess().std))
    own_mean, own_std = (torch.tensor(v).view(3, 1, 1) for v in (seen.mean, seen.std))
    said = FeatureTeacher(str(tmp_path / "t.safetensors"), CPU).says([(pixels - mean) / std])[0]
    with torch.no_grad():
        wanted = F.layer_norm(model.eval()((pixels - own_mean) / own_std), (12,))
    torch.testing.assert_close(said.cls_BE, wanted, atol=1e-5, rtol=1e-4)
    same = FeatureTeacher(str(tmp_path / "t.safetensors"), CPU, views=seen).says([(pixels - own_mean) / own_std])[0]
    torch.testing.assert_close(same.cls_BE, wanted, atol=1e-5, rtol=1e-4)


def test_an_exported_file_teaches_what_its_checkpoint_teaches(teacher: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "teacher.onnx"
    export_onnx(teacher, onnx)
    view = torch.randn(2, 3, 42, 42)
    one, other = (FeatureTeacher(str(path), CPU).says([view])[0] for path in (teacher, onnx))
    torch.testing.assert_close(one.cls_BE, other.cls_BE, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one.patches_BEhw, other.patches_BEhw, atol=1e-4, rtol=1e-3)


def similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosines between different images, centred: what a neighbour search sees."""
    unit = F.normalize(features - features.mean(dim=0), dim=1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_neighbours_of_the_student_become_those_of_the_teacher(teacher: Path, backbone: str) -> None:
    """A ViT of another patch and width, and a ResNet-50."""
    torch.manual_seed(1)
    recipe = RECIPES["smoke"]
    if backbone == "resnet":
        recipe = replace(recipe, backbone=ResNetSpec())
    (recipe,), guide = learn_from(str(teacher), [recipe], CPU)
    assert isinstance(recipe.step, FeatureSpec)
    assert recipe.step.teacher_width == 36
    state = make_state(recipe, CPU)
    state.guide = guide
    views = [torch.randn(8, 3, 6, 6) for _ in range(2)]
    views = [F.interpolate(view, (64, 64) if backbone == "vit" else (32, 32), mode="bicubic") for view in views]
    wanted = similarity(guide.says(views)[0].cls_BE)

    def closeness() -> float:
        state.student.eval()
        with torch.no_grad():
            found = similarity(state.student.backbone(views[0]))
        state.student.train()
        return float(torch.corrcoef(torch.stack([found, wanted]))[0, 1])

    before = closeness()
    rng = np.random.default_rng(0)
    at = AT if backbone == "vit" else replace(AT, lr=1e-4)
    steps = [take_step_(state, views, at, recipe, rng) for _ in range(80 if backbone == "vit" else 6)]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    if backbone == "vit":
        assert 1 - closeness() < 0.4 * (1 - before)


def test_a_run_learns_from_a_backbone_and_resumes_exactly(teacher: Path, images: Path, tmp_path: Path) -> None:
    data, words = open_dataset(str(images)), {**WORDS, "teacher": str(teacher), "workers": 0}
    whole = train(RECIPES["smoke_dinov2"], data, tmp_path / "whole", **words)
    train(RECIPES["smoke_dinov2"], data, tmp_path / "parts", stop_at_step=1, **words)
    parts = train(RECIPES["smoke_dinov2"], data, tmp_path / "parts", **words)
    one, other = load_backbone(whole), load_backbone(parts)
    assert one.manifest.weights_sha256 == other.manifest.weights_sha256
    assert one.model.embed_dim == 48
    resolved = json.loads((tmp_path / "whole" / "recipe.json").read_text())
    assert resolved["teacher"]["weights_sha256"] == load_backbone(teacher).manifest.weights_sha256
    assert resolved["recipe"]["step"]["teacher_width"] == 36
    assert resolved["recipe"]["crops"]["n_local"] == 0
    with pytest.raises(InputError, match="another"):
        train(RECIPES["smoke_dinov2"], data, tmp_path / "whole", **{**words, "teacher": str(whole)})


def test_a_feature_recipe_without_a_teacher_is_refused() -> None:
    recipe = as_feature_student(RECIPES["smoke"], 0)
    with pytest.raises(InputError, match="name one with --teacher"):
        make_state(recipe, CPU)


def test_a_high_resolution_phase_goes_on_with_a_distilled_run_and_asks_for_its_teacher(
    teacher: Path, images: Path, tmp_path: Path
) -> None:
    first, out = tmp_path / "first", tmp_path / "large"
    train(RECIPES["smoke"], open_dataset(str(images)), first, workers=0, teacher=str(teacher), **WORDS)
    options = RunOptions(data=str(images), out=out, workers=0, threads=1)
    with pytest.raises(InputError, match=f"learned from the teacher {teacher}; .* with --teacher"):
        high_resolution.main(str(first), 64, options, epochs=1)
    checkpoint = first / "checkpoints" / "latest.safetensors"
    with pytest.raises(InputError, match="learns the features of a teacher; name one with --teacher"):
        high_resolution.main(str(checkpoint), 64, options, epochs=1)
    assert not out.exists()
    high_resolution.main(str(first), 64, options, epochs=1, teacher=str(teacher))
    found = load_backbone(out / "checkpoints" / "latest.safetensors").manifest
    assert found.architecture["img_px"] == found.preprocess.size_px == 64
    assert {"feature_cls", "feature_patches"} < set(read_steps(out / "log.jsonl")[-1])


def test_the_command_takes_a_backbone_for_its_teacher_and_names_what_is_none(
    teacher: Path, images: Path, tmp_path: Path, repo_root: Path
) -> None:
    def run(teacher: str, out: str) -> subprocess.CompletedProcess[str]:
        words = ["--recipe", "smoke", "--data", str(images), "--out", str(tmp_path / out), "--teacher", teacher]
        return subprocess.run(
            [sys.executable, "-m", "training", *words, "--workers", "0", "--threads", "1", "--epochs", "1"],
            cwd=repo_root,
            env={**os.environ, "PYTHONPATH": str(repo_root)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(str(teacher), "run")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert record["loss"] == pytest.approx(record["feature_cls"] + record["feature_patches"], rel=1e-5)
    wrong = run(str(tmp_path / "absent"), "other")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert "absent" in wrong.stderr
