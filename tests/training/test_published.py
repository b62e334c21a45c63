"""The published configurations: their sizes, their values as the sources print them, and a run of each one's method at a micro size."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbones.checkpoints import load_backbone
from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import ViT, ViTSpec
from data.datasets import open_dataset
from tests.training.micro import micro_twin
from training.dinov2 import Dinov2Spec
from training.loop import Plan, train
from training.methods import make_state
from training.published import PUBLISHED
from training.recipe import Recipe

WORDS = {"source": "test", "revision": "none"}
AT_518 = {  # parameters of the released weights, whose position table is that of 518 px
    ("small", 0): 22_056_576,
    ("base", 0): 86_580_480,
    ("large", 0): 304_368_640,
    ("giant2", 0): 1_136_480_768,
    ("small", 4): 22_058_112,
    ("base", 4): 86_583_552,
    ("large", 4): 304_372_736,
    ("giant2", 4): 1_136_486_912,
}
AT_224 = {
    "dino_vits16": 21_665_664,
    "dino_vits16_300": 21_665_664,
    "dino_vits16_800": 21_665_664,
    "dino_vits8": 21_670_272,
    "dino_vitb16": 85_798_656,
    "dino_vitb8": 85_807_872,
    "dino_resnet50": 23_508_032,
}
WIDTHS = {384: "small", 768: "base", 1024: "large", 1536: "giant2"}


def n_parameters(backbone: ViTSpec | ResNetSpec) -> int:
    with torch.device("meta"):
        network = ViT(backbone) if isinstance(backbone, ViTSpec) else ResNet(backbone)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_backbone_has_as_many_parameters_as_published(name: str) -> None:
    spec = PUBLISHED[name].backbone
    if name in AT_224:
        assert n_parameters(spec) == AT_224[name]
        return
    assert isinstance(spec, ViTSpec)
    if spec.patch_px == 14 and (spec.ffn == "mlp" or spec.width == 1536):
        assert n_parameters(replace(spec, img_px=518)) == AT_518[WIDTHS[spec.width], spec.registers]
        return
    # The large networks trained on ImageNet, whose weights were not released: 300 million, as the paper says of a ViT-L.
    assert n_parameters(spec) == pytest.approx(304e6, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_composes_and_says_where_it_comes_from(name: str) -> None:
    """On torch's meta device, which allocates nothing."""
    recipe = PUBLISHED[name]
    assert recipe.source
    assert recipe.expected or "no " in recipe.source or "not stated" in recipe.source
    with torch.device("meta"):
        state = make_state(recipe, torch.device("meta"))
    heads = [name for name, _ in state.student.named_children() if name != "backbone"]
    assert heads == (["head"] if not isinstance(recipe.step, Dinov2Spec) else ["dino_head", "ibot_head"][: len(heads)])
    assert Plan(recipe, recipe.epoch_steps or 2502).steps == recipe.epochs * (recipe.epoch_steps or 2502)


def test_values_of_the_tables() -> None:
    """Oquab et al. 2023, table 16 and the configuration files: the peak learning rates at their batches, and the steps."""
    short, large, small = (PUBLISHED[f"dinov2_{n}"] for n in ("vitl16_short", "vitl14", "vits14_distilled"))
    assert short.optim.peak_lr(2048) == pytest.approx(4e-3 * math.sqrt(2))
    assert large.optim.peak_lr(3072) == pytest.approx(3.46e-4, rel=2e-3)
    assert small.optim.peak_lr(2048) == pytest.approx(1e-3)
    assert [Plan(r, 1250).steps for r in (short, large, small)] == [125_000, 625_000, 625_000]
    assert Plan(PUBLISHED["dinov2_vitl14_518"], 1250).steps == 10_000
    assert PUBLISHED["dino_vits16"].optim.peak_lr(512) == pytest.approx(1e-3)
    frozen = {name for name in PUBLISHED if name.startswith("dino_vit") and PUBLISHED[name].head.freeze_magnitude}
    assert frozen == {"dino_vits16", "dino_vitb16", "dino_vitb8"}, "norm_last_layer: the default, and ViT-B's"
    assert Plan(large, 1250).at(99_999).lr == pytest.approx(large.optim.peak_lr(3072)), "80 epochs of warm-up"


@pytest.fixture(scope="module")
def giant(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the giant's micro twin, from which the distilled ones learn."""
    folder = tmp_path_factory.mktemp("giant") / "run"
    train(
        micro_twin(PUBLISHED["dinov2_vitg14"]), open_dataset(str(images)), folder, recipe_name="g", workers=0, **WORDS
    )
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_micro_twin_runs_two_steps(name: str, images: Path, giant: Path, tmp_path: Path) -> None:
    """Every recipe's own method, crops, optimiser and schedules; only sizes are others."""
    recipe = micro_twin(PUBLISHED[name])
    assert same_method(recipe, PUBLISHED[name])
    before = make_state(recipe, torch.device("cpu")).student.backbone.state_dict()
    data, given = open_dataset(str(images)), {"workers": 0, **WORDS}
    if recipe.needs == "teacher":
        given["teacher"] = str(giant)
    if recipe.needs == "weights":
        before_it = micro_twin(PUBLISHED[name.rpartition("_")[0]])
        train(before_it, data, tmp_path / "first", recipe_name="first", workers=0, **WORDS)
        given |= {"init": str(tmp_path / "first"), "freeze_backbone_steps": 0}
    checkpoint = train(recipe, data, tmp_path / "run", recipe_name=name, **given)
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    records = [line for line in lines if "loss" in line]
    assert len(records) == 2
    assert all(math.isfinite(record["loss"]) for record in records)
    trained = load_backbone(checkpoint).model.state_dict()
    assert trained.keys() == before.keys()


def same_method(twin: Recipe, recipe: Recipe) -> bool:
    """Whether all that is no size, batch or length is the recipe's."""
    sizes = {
        *("patch_px", "width", "depth", "heads", "img_px"),
        *("global_px", "local_px", "n_local", "size_px", "resize_px", "whole_px"),
        *("prototypes", "hidden", "bottleneck"),
        *("warmup_epochs", "freeze_last_layer_epochs", "epochs", "epoch_steps", "batch_size"),
    }

    def rest(value: object) -> object:
        return {k: rest(v) for k, v in value.items() if k not in sizes} if isinstance(value, dict) else value

    return rest(twin.to_json()) == rest(recipe.to_json())


def test_the_page_of_recipes_lists_each_with_its_scores(repo_root: Path) -> None:
    rows = {
        line.split("|")[1].strip(" `"): line
        for line in (repo_root / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("| `dino")
    }
    assert rows.keys() == PUBLISHED.keys()
    for name, recipe in PUBLISHED.items():
        scores = " / ".join(f"{value:g}" for value in recipe.expected.values()) or "none published"
        assert scores in rows[name]
        assert recipe.source in rows[name]
