"""Feature combinations: the official order, one wide matrix for all, what each preset asks for, and random views."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backbones.checkpoints import Manifest, save_backbone
from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import ViT, ViTSpec
from evaluators import knn
from evaluators.classification import ClassificationRun
from evaluators.combinations import combinations, interleaved, names_for, wide
from evaluators.extract import FeatureTable, features_of
from evaluators.linear import LR_PER_256, LinearSpec, at_rate_for, run
from evaluators.view_batches import ViewSpec, random_box
from exports.to_onnx import export_onnx
from runtimes.torch_runtime import TorchRuntime
from tests.backbones.nets import load_reference
from tests.evaluators.fakes import SMALL, colour_folder


def table(width: int = 6, n: int = 5) -> FeatureTable:
    rng = np.random.default_rng(0)
    blocks = rng.normal(size=(n, 4 * width)).astype(np.float32)
    mean = rng.normal(size=(n, width)).astype(np.float32)
    names = tuple(map(str, range(n)))
    columns = {"embedding": blocks[:, -width:], "patch_mean": mean, "cls_last4": blocks}
    return FeatureTable(names, names, names, columns)


def test_dinos_wide_features_are_interleaved_as_its_released_classifiers_want(reference: Path) -> None:
    backbone, io = load_reference(reference / "v1_vit")
    wanted = load_file(reference / "linear_features" / "features.safetensors")["v1_n1_avgpool1"].numpy()
    with TorchRuntime(backbone, device="cpu") as runtime:
        made = features_of(runtime, io["native/image"].numpy(), ("embedding", "patch_mean"))
    np.testing.assert_allclose(interleaved(made["embedding"], made["patch_mean"]), wanted, atol=2e-5)
    joined = np.concatenate([made["embedding"], made["patch_mean"]], axis=1)
    assert not np.allclose(joined, wanted, atol=1e-2)


@pytest.mark.parametrize(("preset", "width"), [("dino", 6), ("dino", 768), ("dinov2", 6), (None, 6)])
def test_every_combination_is_a_range_of_one_wide_matrix(preset: str | None, width: int) -> None:
    given = table(width)
    names = names_for(preset, given)
    rows = torch.tensor([3, 0, 3])
    made = wide([given], names)
    assert tuple(made.slices) == names
    for name in names:
        np.testing.assert_array_equal(made.take(rows)[:, made.slices[name]], combinations(given)[name][rows.numpy()])


def test_presets_ask_for_the_published_combinations() -> None:
    four = ("cls", "cls+patch_mean", "cls_last4", "cls_last4+patch_mean")
    assert names_for("dinov2", table()) == four
    assert names_for("dino", table(384)) == ("cls_last4",)
    assert names_for("dino", table(768)) == ("cls*patch_mean",)
    plain = FeatureTable(("a",), ("a",), ("a",), {"embedding": np.zeros((1, 4), np.float32)})
    assert [names_for(preset, plain) for preset in ("dino", "dinov2", None)] == [("cls",)] * 3
    assert len(LinearSpec(preset="dinov2").lr) * len(four) == 52
    assert (LinearSpec(preset="dino").epochs, LinearSpec(preset="dino").lr) == (100, (1e-3,))


def of_a_resnet(n: int = 5, width: int = 2048) -> FeatureTable:
    """Its embedding is the mean of its last map's places."""
    given = table(width, n)
    return replace(given, columns=dict.fromkeys(("embedding", "patch_mean"), given.columns["patch_mean"]))


def test_a_network_without_cls_has_one_combination() -> None:
    """Published: the 2048 averaged features of a ResNet-50, once."""
    assert [names_for(preset, of_a_resnet()) for preset in ("dino", "dinov2", None)] == [("cls",)] * 3


@pytest.mark.parametrize("preset", ["dino", "dinov2", None])
def test_a_resnet_is_measured_like_any_network(preset: Literal["dino", "dinov2"] | None, tmp_path: Path) -> None:
    """Its manifest tells a depth of 50, which are layers and no blocks with a CLS token each."""
    torch.manual_seed(0)
    save_backbone(tmp_path / "r.safetensors", ResNet(ResNetSpec()), Manifest(architecture={}, preprocess=SMALL))
    data = colour_folder(tmp_path / "data", n_train=2, n_val=1)
    options = ClassificationRun(ckpt=str(tmp_path / "r.safetensors"), data=str(data), cache_dir=None, threads=1)
    assert knn.run(options)["metrics"]["top1"]["n"] == 3
    result = run(options, LinearSpec(preset=preset, views=0, epochs=1, min_steps=2, held_out=1))
    assert {entry["features"] for entry in result["grid"]} == {"cls"}
    assert result["settings"]["lr"] == ([0.075] if preset == "dino" else list(LR_PER_256))


def test_dinos_preset_takes_another_rate_for_a_resnet_unless_one_is_given() -> None:
    by_default, given = LinearSpec(preset="dino"), LinearSpec(preset="dino", lr=(1e-3,))
    assert [at_rate_for(of_a_resnet(), spec).lr for spec in (by_default, given)] == [(0.075,), (1e-3,)]
    assert at_rate_for(table(768), by_default).lr == (1e-3,)
    assert at_rate_for(of_a_resnet(), LinearSpec()) == LinearSpec()


def test_random_views_repeat_for_a_name_and_differ_between_numbers() -> None:
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    first, again, other = (ViewSpec(view="random", number=number).make(image, SMALL, "a") for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 32, 32)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, ViewSpec(view="random").make(image, SMALL, "b"))
    keys = {
        str(ViewSpec(view="random", number=n, interpolation=f).to_json()) for n in (0, 1) for f in (None, "bilinear")
    }
    assert len(keys) == 4


def test_random_boxes_have_the_published_areas_and_aspects() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(100, 120, rng) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / 12_000
    assert boxes[:, :2].min() == 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (120, 100)
    assert 0.07 < area.min() < 0.1
    assert area.mean() == pytest.approx(0.5, abs=0.05)
    assert (width / height).min() > 0.7
    assert (width / height).max() < 1.4
    assert random_box(1000, 10, rng)[2] <= 10


def test_the_published_grid_runs_on_a_checkpoint_and_says_what_an_export_lacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViT(ViTSpec(patch_px=8, width=16, depth=4, heads=2, img_px=32))
    save_backbone(tmp_path / "a.safetensors", model, Manifest(architecture={}, preprocess=SMALL, source="random"))
    export_onnx(tmp_path / "a.safetensors", tmp_path / "a.onnx")
    data = colour_folder(tmp_path / "data", n_train=10)
    spec = LinearSpec(preset="dinov2", epochs=1, min_steps=20, views=2, held_out=1)
    results = {}
    for name in ("a.safetensors", "a.onnx"):
        options = ClassificationRun(ckpt=str(tmp_path / name), data=str(data), cache_dir=tmp_path / "cache", threads=1)
        results[name] = run(options, spec)
    full, last = results["a.safetensors"], results["a.onnx"]
    assert (len(full["grid"]), len(last["grid"])) == (52, 26)
    assert full["settings"]["views"] == 2
    assert "2 random crops of each image" in full["protocol"]
    assert any("last 4 blocks are not to be had here" in note for note in last["notes"])
    assert {"top1", "top1_best_on_val"} <= set(full["metrics"])
    assert full["metrics"]["top1_best_on_val"]["value"] == max(entry["top1"] for entry in full["grid"])
    more = [run(options, replace(spec, views=3))["timing"]["features_from_cache"] for _ in range(2)]
    assert more == [False, True], "a third view had to be extracted"
