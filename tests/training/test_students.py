"""Several students of one teacher: each learns what it would learn alone, the teacher answers once, and all resume exactly."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbones.checkpoints import load_backbone
from data.datasets import open_dataset
from data.errors import InputError
from training import guides
from training.feature_distillation import FeatureTeacher
from training.loop import Student, train
from training.methods import make_state
from training.recipes import RECIPES

WORDS = {"source": "test", "revision": "none", "workers": 0}
LARGE = RECIPES["smoke_dinov2"]
A = replace(LARGE, backbone=replace(LARGE.backbone, width=24, drop_path=0.0))
B = replace(A, backbone=replace(A.backbone, width=12), optim=replace(A.optim, lr=1e-3))


@pytest.fixture(scope="module")
def teacher(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "run"
    train(LARGE, open_dataset(str(images)), folder, recipe_name="large", **WORDS)
    return folder


def weights(run: Path) -> str:
    return load_backbone(run / "checkpoints" / "latest.safetensors").manifest.weights_sha256


@pytest.mark.parametrize("kind", ["heads", "features"])
def test_each_learns_as_it_would_alone_and_resumes_exactly(
    kind: str, teacher: Path, images: Path, tmp_path: Path
) -> None:
    data = open_dataset(str(images))
    source = str(teacher if kind == "heads" else teacher / "checkpoints" / "latest.safetensors")
    words = {**WORDS, "teacher": source}
    alone = train(B, data, tmp_path / "alone", recipe_name="B", **words)
    beside = [Student("B", B, tmp_path / "both" / "B")]
    # B stops earlier than A, as after a crash between two saves; then both go on.
    train(B, data, tmp_path / "both" / "B", recipe_name="B", stop_at_step=1, **words)
    train(A, data, tmp_path / "both" / "A", recipe_name="A", beside=beside, **words)
    assert weights(tmp_path / "both" / "B") == load_backbone(alone).manifest.weights_sha256
    assert load_backbone(tmp_path / "both" / "A" / "checkpoints" / "latest.safetensors").model.embed_dim == 24
    for run in ("A", "B"):
        lines = (tmp_path / "both" / run / "log.jsonl").read_text().splitlines()
        assert [record["step"] for record in map(json.loads, lines) if "loss" in record] == [0, 1]


@pytest.mark.parametrize("kind", ["heads", "features"])
def test_the_teacher_looks_once_at_each_batch(
    kind: str, teacher: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    if kind == "heads":
        load = guides.frozen_teacher

        def counted(*args: object) -> object:
            guide = load(*args)  # type: ignore[arg-type]
            encode = guide.encode
            guide.encode = lambda *given: (looked.append(1), encode(*given))[1]  # type: ignore[method-assign]
            return guide

        monkeypatch.setattr(guides, "frozen_teacher", counted)
    source = str(teacher if kind == "heads" else teacher / "checkpoints" / "latest.safetensors")
    if kind == "features":
        look = FeatureTeacher._look
        monkeypatch.setattr(FeatureTeacher, "_look", lambda self, view: (looked.append(1), look(self, view))[1])
    beside = [Student("B", B, tmp_path / "B")]
    train(A, open_dataset(str(images)), tmp_path / "A", recipe_name="A", beside=beside, teacher=source, **WORDS)
    steps = 2
    assert len(looked) == (steps if kind == "heads" else 1 + 2 * steps), "features: a trial, and each of two views"


@pytest.mark.parametrize(
    ("others", "teacher_named", "said"),
    [
        ([("B", B)], False, "name it with --teacher"),
        ([("A", B)], True, "named twice"),
        ([("B", replace(B, batch_size=4))], True, "different batch_size"),
        ([("B", replace(B, head=replace(B.head, prototypes=32)))], True, "has prototypes 64, the recipe 32"),
    ],
)
def test_students_that_cannot_learn_together_are_refused(
    others: list[tuple[str, object]], teacher_named: bool, said: str, teacher: Path, images: Path, tmp_path: Path
) -> None:
    beside = [Student(name, recipe, tmp_path / "x" / name) for name, recipe in others]  # type: ignore[arg-type]
    words = {**WORDS, "teacher": str(teacher)} if teacher_named else WORDS
    with pytest.raises(InputError, match=said):
        train(A, open_dataset(str(images)), tmp_path / "x" / "A", recipe_name="A", beside=beside, **words)
    assert not (tmp_path / "x").exists()


def test_the_command_trains_two_at_once(teacher: Path, images: Path, tmp_path: Path, repo_root: Path) -> None:
    words = ["--recipe", "smoke,smoke_dinov2", "--teacher", str(teacher / "checkpoints" / "latest.safetensors")]
    words += [
        "--data",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "0",
        "--threads",
        "1",
        "--epochs",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "training", *words],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [Path(line).parts[-3] for line in done.stdout.splitlines()] == ["smoke", "smoke_dinov2"]
    assert all((tmp_path / "out" / name / "recipe.json").is_file() for name in ("smoke", "smoke_dinov2"))


def test_shared_answers_are_those_of_the_learner() -> None:
    torch.manual_seed(0)
    learner = make_state(A, torch.device("cpu")).teacher
    shared = guides.Shared(learner, 2)
    crops = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    with torch.no_grad():
        for crop in (*crops, *crops):
            read = torch.rand(4, 16) < 0.5
            cls, patches = shared.encode([crop], None, read, "fp32")
            wanted_cls, wanted_patches = learner.encode([crop], None, read, "fp32")
            torch.testing.assert_close(cls, wanted_cls)
            torch.testing.assert_close(patches, wanted_patches)
            found, wanted = (one.scores(cls, patches)[0].bottleneck_RE for one in (shared, learner))
            assert torch.equal(found, wanted)
