"""Runs: they resume with the same bits, stop when told, say what is wrong, and leave a folder that others can read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from backbones.checkpoints import load_backbone
from backbones.resnet import ResNetSpec
from data.crops import CropSpec
from data.datasets import open_dataset
from data.errors import CheckFailed, InputError
from evaluators import knn
from evaluators.classification import ClassificationRun
from tests.training.conftest import write_images
from training import loop
from training.dinov1 import train_step_
from training.dinov2 import Dinov2Spec
from training.distillation import Schedule, StepSpec
from training.loop import Plan, train
from training.methods import make_state
from training.recipe import OptimSpec, Recipe
from training.recipes import RECIPES, find_recipe
from training.resume import room_for
from training.run_folder import RunFolder
from training.run_log import read_steps

WORDS = {"recipe_name": "smoke", "source": "test", "revision": "none"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def smoke(**changes: object) -> Recipe:
    return replace(RECIPES["smoke"], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["smoke", "smoke_dinov2"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(folder: Path, tmp_path: Path, name: str) -> None:
    data, recipe = open_dataset(str(folder)), RECIPES[name]
    whole = train(recipe, data, tmp_path / "whole", workers=0, **WORDS)
    train(recipe, data, tmp_path / "parts", workers=0, stop_at_step=1, **WORDS)
    torch.rand(7)  # whatever happens between the two
    parts = train(recipe, data, tmp_path / "parts", workers=1, **WORDS)
    one, other = load_backbone(whole), load_backbone(parts)
    assert one.manifest.weights_sha256 == other.manifest.weights_sha256
    assert one.manifest.step == other.manifest.step == 4
    losses = [[record["loss"] for record in read_steps(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_the_run_folder_holds_what_it_promises(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    checkpoint = train(smoke(), open_dataset(str(folder)), out, workers=0, **WORDS)
    backbone = load_backbone(checkpoint)
    assert backbone.manifest.preprocess == RECIPES["smoke"].preprocess
    assert backbone.manifest.recipe is not None
    assert backbone.manifest.recipe["name"] == "smoke"
    assert json.loads((out / "recipe.json").read_text())["seed"] == 0
    assert list((out / "tensorboard").glob("events*"))
    assert cv2.imread(str(out / "attention.png")) is not None
    assert list(json.loads((out / "skipped.json").read_text())) == ["07.jpg"]
    assert capsys.readouterr().err.count("1 of 20 images cannot be read and are passed over, first 07.jpg") == 1
    record = read_steps(out / "log.jsonl")[-1]
    assert {"loss", "lr", "momentum", "kl_nats", "images_per_s"} <= set(record)
    assert {"target_entropy_nats", "prototypes_used", "effective_rank", "feature_spread", "center_norm"} <= set(record)


BROKEN = {f"{i:02d}.jpg" for i in range(0, 40, 4)}


@pytest.fixture(scope="module")
def partly_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images, every fourth broken: an epoch of five steps of eight meets all of them, a step only some."""
    root = write_images(tmp_path_factory.mktemp("broken"), 40)
    for name in BROKEN:
        (root / name).write_bytes(b"not a picture")
    return root


def listed(run: Path) -> set[str]:
    """The images that a run says it passed over."""
    return set(json.loads((run / "skipped.json").read_text()))


def test_a_resumed_run_lists_what_was_passed_over_before_it_and_what_it_meets_itself(
    partly_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = open_dataset(str(partly_broken)), tmp_path / "run"
    train(smoke(), data, out, workers=0, stop_at_step=5, **WORDS)
    assert listed(out) == BROKEN
    train(smoke(), data, out, workers=0, stop_at_step=6, **WORDS)
    assert listed(out) == BROKEN
    assert capsys.readouterr().err.count("10 of 40 images cannot be read") == 2, "each process tells of all"
    (out / "skipped.json").write_text('{"00.jpg": "met before"}')
    train(smoke(), data, out, workers=0, **WORDS)
    assert listed(out) == BROKEN


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a": 1}'])
def test_a_damaged_list_of_what_was_passed_over_is_begun_anew(
    partly_broken: Path, tmp_path: Path, content: bytes
) -> None:
    data = open_dataset(str(partly_broken))
    train(smoke(), data, tmp_path / "run", workers=0, stop_at_step=1, **WORDS)
    (tmp_path / "run" / "skipped.json").write_bytes(content)
    train(smoke(), data, tmp_path / "run", workers=0, stop_at_step=2, **WORDS)
    assert set() < listed(tmp_path / "run") <= BROKEN


def test_a_dinov2_run_logs_each_term_as_it_is_optimised(folder: Path, tmp_path: Path) -> None:
    train(RECIPES["smoke_dinov2"], open_dataset(str(folder)), tmp_path / "run", workers=0, **WORDS)
    for record in read_steps(tmp_path / "run" / "log.jsonl"):
        terms = [record[name] for name in ("dino_local", "dino_global", "koleo", "ibot")]
        assert sum(terms) == pytest.approx(record["loss"], rel=1e-5)
        assert {"grad_norm_backbone", "grad_norm_dino_head"} <= set(record)
    watched = read_steps(tmp_path / "run" / "log.jsonl")[0]
    assert {"ibot_target_entropy_nats", "ibot_prototypes_used", "patch_spread", "student_entropy_nats"} <= set(watched)


def test_bfloat16_in_the_backbone_rounds_features_and_leaves_the_head_exact() -> None:
    state = loop.make_state(smoke(), torch.device("cpu"))
    views = [torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)]
    exact, _ = state.student(views)
    logits, features = state.student(views, precision="bf16")
    assert logits.dtype == features.dtype == torch.float32
    assert not torch.equal(logits, exact)
    assert (logits - exact).abs().max() < 0.05, "logits are cosines"
    assert torch.equal(state.student.head(features.flatten(0, 1)).view_as(logits), logits)


def test_the_student_learns_what_a_fixed_teacher_says(folder: Path) -> None:
    """With the teacher held still, steps on the same views bring the student's predictions to the teacher's targets."""
    recipe = smoke()
    torch.manual_seed(0)
    state = loop.make_state(recipe, torch.device("cpu"))
    views = [torch.randn(8, 3, side, side) for side in (32, 32, 16, 16)]
    still = Schedule(lr=2e-3, weight_decay=0.0, momentum=1.0, teacher_temperature=0.04, freeze_last_layer=False)
    fixed = StepSpec(center_momentum=1.0)
    before = {name: p.clone() for name, p in state.teacher.named_parameters()}
    kl = [train_step_(state, views, still, fixed)["kl_nats"] for _ in range(60)]
    assert kl[-1] < 0.3 * kl[0]
    assert all(torch.equal(p, before[name]) for name, p in state.teacher.named_parameters())


def test_the_teacher_follows_the_student(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = loop.make_state(smoke(), torch.device("cpu")).teacher.backbone.state_dict()
    checkpoint = train(smoke(), open_dataset(str(folder)), tmp_path / "run", workers=0, **WORDS)
    trained = load_backbone(checkpoint).model.state_dict()
    moved = (trained["blocks.0.mlp.fc1.weight"] - first["blocks.0.mlp.fc1.weight"]).abs().max()
    assert 0 < moved < 1e-2


def test_knn_of_the_teacher_is_what_the_evaluator_measures_on_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled"
    for split, n in (("train", 6), ("val", 4)):
        for name, value in (("dark", 60), ("light", 200)):
            (labelled / split / name).mkdir(parents=True)
            rng = np.random.default_rng([n, value])
            for i in range(n):
                noise = rng.integers(0, 50, (40, 40, 3)).astype(np.uint8)
                cv2.imwrite(str(labelled / split / name / f"{i}.png"), noise + np.uint8(value))
    out = tmp_path / "run"
    checkpoint = train(smoke(), open_dataset(str(folder)), out, workers=0, eval_data=str(labelled), **WORDS)
    records = read_steps(out / "log.jsonl")
    assert ["knn_top1" in record for record in records] == [False, True, False, True], "after each epoch of two steps"
    wanted = knn.run(ClassificationRun(ckpt=str(checkpoint), data=str(labelled), cache_dir=None, device="cpu"))
    assert records[-1]["knn_top1"] == wanted["metrics"]["top1"]["value"]
    plain = train(smoke(), open_dataset(str(folder)), tmp_path / "plain", workers=0, **WORDS)
    one, other = load_backbone(checkpoint), load_backbone(plain)
    assert one.manifest.weights_sha256 == other.manifest.weights_sha256, "measuring changes nothing"


def test_what_an_optimiser_counts_is_restored_where_its_parameter_is() -> None:
    """On a GPU fused AdamW reads the count of steps there. No test machine has one: a device of shapes without values stands for it."""
    parameter = torch.nn.Parameter(torch.empty(3, 2, device="meta"))
    moments, steps = (room_for(parameter, torch.Size(shape)) for shape in ((3, 2), ()))
    assert (moments.device.type, steps.device.type) == ("meta", "meta")
    assert (moments.shape, steps.shape, steps.dtype) == ((3, 2), (), torch.float32)
    assert not moments.requires_grad


def test_another_recipe_in_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    data = open_dataset(str(folder))
    train(smoke(), data, tmp_path / "run", workers=0, stop_at_step=1, **WORDS)
    with pytest.raises(InputError, match="another recipe"):
        train(smoke(batch_size=4), data, tmp_path / "run", workers=0, **WORDS)


def cut_short(state: Path) -> Path:
    """One of the files of a saved state, now without its end."""
    victim = max(state.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1000])
    return victim


def test_a_state_that_was_cut_short_is_passed_over_for_the_one_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = open_dataset(str(folder)), tmp_path / "run"
    whole = train(smoke(), data, tmp_path / "whole", workers=0, **WORDS)
    train(smoke(), data, out, workers=0, stop_at_step=3, **WORDS)
    older, newer = RunFolder(out).states.complete()
    victim = cut_short(newer)
    parts = train(smoke(), data, out, workers=0, **WORDS)
    said = capsys.readouterr().err
    assert f"{victim}: has " in said
    assert f"going on from {older}" in said
    assert load_backbone(parts).manifest.weights_sha256 == load_backbone(whole).manifest.weights_sha256
    assert len(read_steps(out / "log.jsonl")) == 4


def test_where_no_state_is_sound_the_way_out_is_named(folder: Path, tmp_path: Path) -> None:
    data, out = open_dataset(str(folder)), tmp_path / "run"
    train(smoke(), data, out, workers=0, stop_at_step=1, **WORDS)
    (state,) = RunFolder(out).states.complete()
    cut_short(state)
    with pytest.raises(InputError, match=r"safetensors: has \d+ bytes of \d+; remove .* to start the run anew"):
        train(smoke(), data, out, workers=0, **WORDS)


@pytest.mark.parametrize("contents", ["", "[1, 2]", '{"step": 1, "bytes_by_file": {"absent": 3}}'])
def test_a_state_without_its_list_of_files_is_named(folder: Path, tmp_path: Path, contents: str) -> None:
    data, out = open_dataset(str(folder)), tmp_path / "run"
    train(smoke(), data, out, workers=0, stop_at_step=1, **WORDS)
    (state,) = RunFolder(out).states.complete()
    (state / "state.json").write_text(contents)
    with pytest.raises(InputError, match=r"state\.json: is damaged|absent: is missing"):
        train(smoke(), data, out, workers=0, **WORDS)


def test_a_state_of_other_networks_is_named(folder: Path, tmp_path: Path) -> None:
    data, out = open_dataset(str(folder)), tmp_path / "run"
    train(smoke(), data, out, workers=0, stop_at_step=1, **WORDS)
    other = train(RECIPES["smoke_dinov2"], data, tmp_path / "other", workers=0, stop_at_step=1, **WORDS)
    shutil.rmtree(out / "state")
    shutil.copytree(other.parent.parent / "state", out / "state")
    with pytest.raises(InputError, match="does not fit this recipe"):
        train(smoke(), data, out, workers=0, **WORDS)


def test_a_run_of_an_older_version_is_left_alone(folder: Path, tmp_path: Path) -> None:
    data, out = open_dataset(str(folder)), tmp_path / "run"
    train(smoke(), data, out, workers=0, stop_at_step=1, **WORDS)
    (out / "state.pt").touch()
    with pytest.raises(InputError, match="of an older version"):
        train(smoke(), data, out, workers=0, **WORDS)


def test_a_damaged_recipe_is_named(folder: Path, tmp_path: Path) -> None:
    data = open_dataset(str(folder))
    train(smoke(), data, tmp_path / "run", workers=0, stop_at_step=1, **WORDS)
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(InputError, match=r"recipe\.json: cannot be read"):
        train(smoke(), data, tmp_path / "run", workers=0, **WORDS)


def test_a_run_that_failed_before_it_saved_anything_may_start_anew(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        (images / f"{i}.jpg").write_text("no picture")
    with pytest.raises(InputError, match="8 images in a row cannot be read"):
        train(smoke(epochs=1), open_dataset(str(images)), tmp_path / "run", workers=0, **WORDS)
    for i in range(8):
        cv2.imwrite(str(images / f"{i}.jpg"), np.full((40, 40, 3), 30 * i, np.uint8))
    train(smoke(epochs=1), open_dataset(str(images)), tmp_path / "run", workers=0, **WORDS)
    assert len(read_steps(tmp_path / "run" / "log.jsonl")) == 1


def test_losses_that_stay_non_finite_end_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "take_step_", lambda *_, **__: {"loss": float("nan")})
    with pytest.raises(CheckFailed, match="5 steps in a row"):
        train(smoke(epochs=4), open_dataset(str(folder)), tmp_path / "run", workers=0, **WORDS)


def test_one_image_is_not_enough(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 image"):
        train(smoke(), open_dataset(str(folder)).subset([0]), tmp_path / "run", workers=0, **WORDS)


def test_schedules_span_the_run() -> None:
    recipe = RECIPES["dino_vits16"]
    plan = Plan(recipe, steps_per_epoch=10)
    assert plan.steps == 1000
    assert plan.at(0).lr == 0
    assert plan.at(99).lr == pytest.approx(recipe.optim.lr * 2)
    assert plan.at(0).freeze_last_layer
    assert not plan.at(10).freeze_last_layer
    assert plan.at(999).momentum == pytest.approx(1.0, abs=1e-5)


def test_an_epoch_of_a_fixed_number_of_steps_does_not_depend_on_the_data(folder: Path, tmp_path: Path) -> None:
    """Nineteen readable images are two batches of eight; three steps an epoch go on into the next pass."""
    train(smoke(epoch_steps=3), open_dataset(str(folder)), tmp_path / "run", workers=0, **WORDS)
    records = read_steps(tmp_path / "run" / "log.jsonl")
    assert [record["epoch"] for record in records] == [0, 0, 1, 1, 2, 2]


def test_views_are_normalised_as_the_checkpoint_will_see_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []

    def step_(state: object, views: list[torch.Tensor], *_: object) -> dict[str, float]:
        shown.extend(view.clone() for view in views)
        return {"loss": 0.0}

    monkeypatch.setattr(loop, "take_step_", step_)
    plain = replace(RECIPES["smoke"].preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for name, preprocess in (("imagenet", RECIPES["smoke"].preprocess), ("plain", plain)):
        checkpoint = train(
            smoke(preprocess=preprocess), open_dataset(str(folder)), tmp_path / name, workers=0, stop_at_step=1, **WORDS
        )
        assert load_backbone(checkpoint).manifest.preprocess == preprocess
    imagenet, zero_to_one = (torch.cat([view.flatten() for view in half]) for half in (shown[:4], shown[4:]))
    assert imagenet.min() < -0.5
    assert 0 <= zero_to_one.min() < zero_to_one.max() <= 1


def test_a_resnet_learns_too(folder: Path, tmp_path: Path) -> None:
    recipe = smoke(backbone=ResNetSpec(), optim=OptimSpec(optimizer="sgd", lr=0.03, warmup_epochs=1), epochs=1)
    checkpoint = train(recipe, open_dataset(str(folder)), tmp_path / "run", workers=0, stop_at_step=1, **WORDS)
    found = load_backbone(checkpoint)
    assert found.manifest.architecture["family"] == "resnet"
    assert torch.isfinite(found.model(torch.rand(1, 3, 32, 32))).all()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_its_networks(name: str) -> None:
    """On torch's meta device, which allocates nothing: also the giant."""
    with torch.device("meta"):
        state = make_state(RECIPES[name], torch.device("meta"))
    assert {p.requires_grad for p in state.teacher.parameters()} == {False}
    assert state.student.state_dict().keys() == state.teacher.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 1, "step": Dinov2Spec()}, "KoLeo needs at least 2 images"),
        ({"backbone": ResNetSpec(), "step": Dinov2Spec()}, "a ResNet has not"),
        ({"epoch_steps": 0}, "want at least 1"),
        ({"crops": CropSpec(global_px=36, local_px=16)}, "no multiple of the patch of 8 px; 32 would be"),
    ],
)
def test_recipes_that_cannot_work_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        smoke(**changes)


def test_recipes_are_found_by_name() -> None:
    assert find_recipe("dino_vits16", 10).backbone.width == 384
    longer = replace(RECIPES["dino_vits16"], batch_size=8, epochs=200)
    assert find_recipe("dino_vits16", 10, batch_size=8, epochs=200) == longer
    with pytest.raises(InputError, match="smoke"):
        find_recipe("dino_vits17", 10)


def test_a_shortened_recipe_shortens_its_warm_ups() -> None:
    """As they are, ten epochs of warm-up would be all of a run of ten."""
    plan = Plan(find_recipe("dinov2_vits14", 10, epochs=10), 1250)
    peak = max(range(plan.steps), key=lambda step: plan.at(step).lr)
    assert peak == plan.steps // 10 - 1
    assert plan.at(plan.steps - 1).lr < plan.peak / 100
    assert plan.at(plan.steps - 1).teacher_temperature == 0.07


@pytest.mark.parametrize(("name", "flag"), [("dinov2_vits14_distilled", "--teacher"), ("dinov2_vitl14_518", "--init")])
def test_a_recipe_that_begins_with_something_asks_for_it(name: str, flag: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name} .* with {flag}"):
        train(RECIPES[name], open_dataset(str(images)), tmp_path / "run", **WORDS | {"recipe_name": name})
    assert not (tmp_path / "run").exists()
