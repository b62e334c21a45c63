"""Heads merged into the file: every kind on every network that can have it, at several sizes, equal to torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from backbones.checkpoints import Manifest, load_backbone, save_backbone
from backbones.heads import (
    DepthHeadSpec,
    HeadManifest,
    LinearHead,
    LinearHeadSpec,
    SegmentationHead,
    SegmentationHeadSpec,
    load_linear_head,
    make_depth_head,
    save_head,
)
from backbones.network import LINEAR_FEATURES, load_heads, make_network
from backbones.vit import ViT
from data.errors import InputError
from evaluators.combinations import combinations
from evaluators.extract import FeatureTable, features_of
from exports.to_onnx import CLASS_TOLERANCE, TOLERANCE, export_onnx, output_difference
from runtimes.onnx_runtime import OnnxRuntime
from runtimes.torch_runtime import TorchRuntime
from tests.exports.artifacts import SIZES, V1, V2, save_network

STEP = {"v1": 8, "v2": 7, "resnet": 32}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classifier on CLS": ("v1", "linear", {"features": "cls"}),
    "classifier on CLS and the mean patch": ("v2", "linear", {"features": "cls+patch_mean"}),
    "classifier on CLS and the mean patch in turn": ("v1", "linear", {"features": "cls*patch_mean"}),
    "classifier on the CLS of four blocks": ("v1", "linear", {"features": "cls_last4"}),
    "classifier on four blocks beside registers": ("v2", "linear", {"features": "cls_last4+patch_mean"}),
    "classifier on a ResNet": ("resnet", "linear", {"features": "cls+patch_mean"}),
    "segmentation on the last patches": ("v1", "segmentation", {}),
    "segmentation on four layers": ("v2", "segmentation", {"layers": (0, 1, 2, 3)}),
    "segmentation on a ResNet": ("resnet", "segmentation", {}),
    "depth on the last layer": ("v2", "depth", {}),
    "depth on two layers": ("v1", "depth", {"layers": (1, 3)}),
    "depth on a ResNet": ("resnet", "depth", {}),
    "DPT depth": ("v1", "depth", {"layers": (0, 1, 2, 3), "decoder": "dpt", "channels": 16}),
    "DPT depth beside registers": ("v2", "depth", {"layers": (0, 1, 2, 3), "decoder": "dpt", "channels": 16}),
}
OUTPUT = {"linear": "logits", "segmentation": "classes", "depth": "depth"}


def make_backbone_file(name: str, folder: Path) -> Path:
    """A lively network, four blocks deep where it has blocks."""
    if name == "resnet":
        return save_network("resnet", folder)[0]
    torch.manual_seed(1)
    model = ViT(replace({"v1": V1, "v2": V2}[name], depth=4))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2) if weight.dim() > 1 else weight.normal_(mean=0.5, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_backbone(folder / "x.safetensors", model, Manifest(architecture={}, preprocess=SIZES[name], source="random"))
    return folder / "x.safetensors"


def make_head_file(ckpt: Path, kind: str, options: dict[str, Any], path: Path) -> Path:
    """A random head of this kind that fits the backbone."""
    torch.manual_seed(2)
    backbone = load_backbone(ckpt)
    width, options = int(backbone.model.embed_dim), dict(options)  # type: ignore[arg-type]
    features = options.pop("features", "")
    n_layers = max(1, len(options.get("layers", ())))
    head: Any
    if kind == "linear":
        parts = LINEAR_FEATURES.get(features, LINEAR_FEATURES["cls"])
        head = LinearHead(LinearHeadSpec(n_classes=5, width_in=width * (parts.blocks + parts.patch_mean)))
    elif kind == "segmentation":
        head = SegmentationHead(SegmentationHeadSpec(n_classes=5, width_in=width * n_layers, **options))
    else:
        head = make_depth_head(DepthHeadSpec(width_in=2 * width * n_layers, bins=16, **options))
    with torch.no_grad():  # so that a map is not one value
        if kind == "segmentation":
            head.linear.weight -= head.linear.weight.mean(dim=1, keepdim=True)
            head.linear.bias.zero_()
        elif options.get("decoder") == "dpt":
            head.decoder.last.bias.fill_(2)
    classes = tuple("abcde") if kind != "depth" else ()
    fits = backbone.manifest.weights_sha256
    save_head(path, head, HeadManifest(kind=kind, backbone_sha256=fits, spec={}, features=features, classes=classes))
    return path


def heads_of_another_backbone(folder: Path) -> dict[str, Path]:
    """A head of each kind that fits a backbone which is not among the artifacts."""
    ckpt = make_backbone_file("v1", folder / "another")
    return {kind: make_head_file(ckpt, kind, {}, folder / "another" / f"{kind}.safetensors") for kind in OUTPUT}


@pytest.mark.parametrize("case", CASES)
def test_a_head_in_the_file_gives_what_it_gives_on_torch(case: str, tmp_path: Path) -> None:
    name, kind, options = CASES[case]
    ckpt = make_backbone_file(name, tmp_path)
    head = make_head_file(ckpt, kind, options, tmp_path / "head.safetensors")
    done = export_onnx(ckpt, tmp_path / "x.onnx", **{f"{kind}_head": head})  # type: ignore[arg-type]
    output = OUTPUT[kind]
    assert output in done.parity.differences
    backbone, step, rng = load_backbone(ckpt), STEP[name], np.random.default_rng(0)
    network = make_network(backbone, load_heads(backbone, **{kind: head}))
    with TorchRuntime(backbone, network=network, device="cpu") as wanted, OnnxRuntime(tmp_path / "x.onnx") as found:
        assert found.outputs == wanted.outputs
        assert found.heads[kind]["backbone_sha256"] == backbone.manifest.weights_sha256
        for n, h, w in ((1, 3, 3), (3, 2, 5), (2, 4, 1)):
            pixels = rng.standard_normal((n, 3, h * step, w * step), dtype=np.float32)
            expected, got = wanted.run(pixels, (output,))[output], found.run(pixels, (output,))[output]
            assert got.dtype == (np.int32 if output == "classes" else np.float32)
            assert output_difference(got, expected) < (CLASS_TOLERANCE if output == "classes" else TOLERANCE / 4)
            assert np.unique(got).size > 1


def test_every_combination_that_the_evaluators_train_on_is_what_the_file_computes(tmp_path: Path) -> None:
    ckpt = make_backbone_file("v2", tmp_path)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 21, 28), dtype=np.float32)
    with TorchRuntime(load_backbone(ckpt), device="cpu") as torch_runtime:
        columns = features_of(torch_runtime, pixels, ("embedding", "patch_mean", "cls_last4"))
    known = combinations(FeatureTable(tuple("abc"), (None,) * 3, tuple("abc"), columns))
    assert set(known) == set(LINEAR_FEATURES)
    for name, features_nW in known.items():
        folder = tmp_path / name.replace("*", "-in-turn-with-")
        folder.mkdir()
        path = make_head_file(ckpt, "linear", {"features": name}, folder / "head.safetensors")
        head, _ = load_linear_head(path, load_backbone(ckpt).manifest.weights_sha256)
        with torch.no_grad():
            wanted = head(torch.from_numpy(features_nW)).numpy()
        export_onnx(ckpt, folder / "x.onnx", linear_head=path)
        with OnnxRuntime(folder / "x.onnx") as found:
            np.testing.assert_allclose(found.run(pixels, ("logits",))["logits"], wanted, atol=2e-5, err_msg=name)


def test_a_classifier_on_more_blocks_than_there_are_is_refused(tmp_path: Path) -> None:
    for name, words in (("v1", "this backbone has 2 blocks"), ("resnet", "this backbone is a ResNet")):
        ckpt, _ = save_network(name, tmp_path)
        head = make_head_file(ckpt, "linear", {"features": "cls_last4"}, tmp_path / f"{name}-h.safetensors")
        with pytest.raises(InputError, match=f"the linear head reads cls_last4, {words}"):
            export_onnx(ckpt, tmp_path / "x.onnx", linear_head=head)
    assert not (tmp_path / "x.onnx").exists()


def test_all_heads_share_one_file_and_none_changes_the_backbones_outputs(tmp_path: Path) -> None:
    ckpt = make_backbone_file("v1", tmp_path)
    heads = {
        f"{kind}_head": make_head_file(ckpt, kind, options, tmp_path / f"{kind}.safetensors")
        for kind, options in (
            ("linear", {"features": "cls_last4"}),
            ("depth", {"layers": (0, 1, 2, 3), "decoder": "dpt", "channels": 16}),
            ("segmentation", {"layers": (2, 3)}),
        )
    }
    export_onnx(ckpt, tmp_path / "all.onnx", **heads)  # type: ignore[arg-type]
    export_onnx(ckpt, tmp_path / "none.onnx")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 24, 40), dtype=np.float32)
    with OnnxRuntime(tmp_path / "all.onnx") as whole, OnnxRuntime(tmp_path / "none.onnx") as plain:
        assert whole.outputs == ("embedding", "patches", "attention", "logits", "depth", "classes")
        made = whole.run(pixels, whole.outputs)
        for output, array in plain.run(pixels, plain.outputs).items():
            np.testing.assert_allclose(made[output], array, atol=1e-6 * np.abs(array).max())
    onnx.checker.check_model(str(tmp_path / "all.onnx"), full_check=True)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("depth", "segmentation", "is a segmentation head; wanted a depth head"),
        ("segmentation", "linear", "is a linear head; wanted a segmentation head"),
        ("linear", "depth", "is a depth head; wanted a linear head"),
    ],
)
def test_a_head_of_another_kind_is_refused(kind: str, given: str, words: str, tmp_path: Path) -> None:
    ckpt = make_backbone_file("v1", tmp_path)
    head = make_head_file(ckpt, given, {"features": "cls"} if given == "linear" else {}, tmp_path / "h.safetensors")
    with pytest.raises(InputError, match=words):
        export_onnx(ckpt, tmp_path / "x.onnx", **{f"{kind}_head": head})  # type: ignore[arg-type]
    assert not (tmp_path / "x.onnx").exists()


def test_a_classifier_on_features_that_no_file_has_is_refused(tmp_path: Path) -> None:
    ckpt = make_backbone_file("v1", tmp_path)
    head = make_head_file(ckpt, "linear", {"features": "cls of four layers"}, tmp_path / "h.safetensors")
    with pytest.raises(InputError, match="reads the features 'cls of four layers'; a network gives cls, cls"):
        export_onnx(ckpt, tmp_path / "x.onnx", linear_head=head)
    assert not (tmp_path / "x.onnx").exists()
