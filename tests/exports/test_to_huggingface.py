"""What transformers makes of our folders, and our loader of our files in the published layout."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from backbones.checkpoints import Manifest, load_backbone, save_backbone
from backbones.vit import ViT
from data.errors import InputError
from data.preprocess import center_view
from exports.to_huggingface import export_huggingface
from tests.backbones.nets import FORWARD
from tests.exports.artifacts import SIZES, V2, artifact, save_network

HF = ("dinov2", "dinov2_swiglu", "dinov2_registers", "vit_dinov1")


def their_model(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **_without_pooler(folder))
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def _without_pooler(folder: Path) -> dict[str, bool]:
    return (
        {"add_pooling_layer": False} if json.loads((folder / "config.json").read_text())["model_type"] == "vit" else {}
    )


def tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features = model.features(pixels)
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


@pytest.mark.parametrize("name", HF)
def test_a_folder_of_theirs_comes_back_key_by_key(reference: Path, tmp_path: Path, name: str) -> None:
    theirs = reference / "hf" / name
    native_px = json.loads((theirs / "config.json").read_text())["image_size"]
    export_huggingface(theirs, tmp_path / "x", size_px=native_px)
    wanted, found = load_file(theirs / "model.safetensors"), load_file(tmp_path / "x" / "model.safetensors")
    pooler = {key for key in wanted if key.startswith("pooler.")}
    assert set(found) == set(wanted) - pooler
    for key, weight in found.items():
        assert torch.equal(weight, wanted[key]), key
    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "x", theirs))
    assert {key: original.get(key) for key in config if key in original} == {
        k: v for k, v in config.items() if k in original
    }
    assert config["architectures"] == original["architectures"]


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_transformers_gives_our_features_for_what_its_own_processor_prepares(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ckpt = artifact(name).ckpt
    export_huggingface(ckpt, tmp_path / "x")
    backbone = load_backbone(ckpt)
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x")
    prepared = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(center_view(image, backbone.manifest.preprocess))[None]
    assert prepared.shape == ours.shape
    assert (
        prepared - ours
    ).abs().mean() < 0.02  # one shade is 0.017: the two resize filters round alike but for a few pixels
    with torch.no_grad():
        found = their_model(tmp_path / "x")(ours).last_hidden_state
    torch.testing.assert_close(found, tokens(backbone.model, ours), **FORWARD)


@pytest.mark.parametrize("whole_px", [64, 96])
def test_the_size_of_whole_views_comes_back_so_that_maps_are_measured_alike(tmp_path: Path, whole_px: int) -> None:
    backbone = load_backbone(artifact("v1").ckpt)
    preprocess = replace(backbone.manifest.preprocess, whole_px=whole_px)
    save_backbone(tmp_path / "a.safetensors", backbone.model, replace(backbone.manifest, preprocess=preprocess))
    export_huggingface(tmp_path / "a.safetensors", tmp_path / "x")
    assert load_backbone(tmp_path / "x").manifest.preprocess == preprocess
    config = tmp_path / "x" / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"whole_px": "wide"}))
    with pytest.raises(InputError, match="whole_px"):
        load_backbone(tmp_path / "x")


def test_with_registers_every_size_agrees_and_the_table_stays(tmp_path: Path) -> None:
    ckpt = artifact("v2").ckpt
    assert export_huggingface(ckpt, tmp_path / "x") == []
    backbone = load_backbone(ckpt)
    model = their_model(tmp_path / "x")
    for height, width in ((14, 14), (28, 28), (21, 35), (7, 7)):
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(model(pixels).last_hidden_state, tokens(backbone.model, pixels), **FORWARD)
    assert torch.equal(load_backbone(tmp_path / "x").model.pos_embed, backbone.model.pos_embed)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_dinov2_without_registers_is_their_dinov2_model(tmp_path: Path, ffn: Any) -> None:
    torch.manual_seed(0)
    model = ViT(replace(V2, registers=0, ffn=ffn, pos_offset=0.1, pos_antialias=False)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    save_backbone(tmp_path / "x.safetensors", model, Manifest(architecture={}, preprocess=SIZES["v2"]))
    (note,) = export_huggingface(tmp_path / "x.safetensors", tmp_path / "x")
    assert "resampled from 14 to 28 px" in note
    theirs, pixels = their_model(tmp_path / "x"), torch.randn(2, 3, 28, 28)
    assert type(theirs).__name__ == "Dinov2Model"
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).last_hidden_state, tokens(model, pixels), **FORWARD)


def test_without_registers_the_table_is_made_for_the_size_that_is_seen_unless_another_is_named(tmp_path: Path) -> None:
    ckpt = save_network("v1", tmp_path)[0]  # a table for 24 px, seen at 24
    assert export_huggingface(ckpt, tmp_path / "a") == []
    (note,) = export_huggingface(ckpt, tmp_path / "b", size_px=40)
    assert "resampled from 24 to 40 px" in note
    model, pixels = load_backbone(ckpt).model, torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            their_model(tmp_path / "b")(pixels).last_hidden_state, tokens(model, pixels), **FORWARD
        )
    with pytest.raises(InputError, match="--size-px 30: wanted a multiple of the patch, 8"):
        export_huggingface(ckpt, tmp_path / "c", size_px=30)


@pytest.mark.parametrize("name", ["v1", "v2", "resnet"])
def test_the_published_layout_comes_back_with_the_same_outputs(tmp_path: Path, name: str) -> None:
    ckpt = artifact(name).ckpt
    notes = export_huggingface(ckpt, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    before, after = load_backbone(ckpt), load_backbone(tmp_path / "x.pth")
    if isinstance(before.model, ViT):
        assert notes, "heads of a width of 16 and 8 cannot be read off the weights"
        assert ("mask_token" in state) == (name == "v2")
    pixels = torch.randn(2, 3, *{"v1": (24, 40), "v2": (21, 35), "resnet": (64, 96)}[name])
    with torch.no_grad():
        expected, found = before.model.outputs(pixels), after.model.outputs(pixels)  # type: ignore[operator]
    for output, array in expected.items():
        assert torch.equal(found[output], array), output


@pytest.mark.parametrize("variant", ["noreg_mlp", "reg4_mlp"])
def test_published_weights_keep_their_names(reference: Path, tmp_path: Path, variant: str) -> None:
    original = load_file(reference / "v2_vit" / variant / "weights.safetensors")
    torch.save(original, tmp_path / "a.pth")
    (tmp_path / "a.architecture.json").write_text('{"heads": 3}')
    export_huggingface(tmp_path / "a.pth", tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(again) == list(load_backbone(tmp_path / "a.pth").model.state_dict())
    assert set(again) == set(original)
    assert all(torch.equal(again[name], original[name]) for name in original)


def test_what_is_in_the_way_or_does_not_fit_is_refused_in_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    v1, resnet = artifact("v1").ckpt, artifact("resnet").ckpt
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("a file")
    for ckpt, out, words in (
        (v1, "taken", "is there already; delete it first"),
        (v1, "file", "is there already"),
        (v1, "file/deep", "cannot be written"),
        (resnet, "folder", "this is a ResNet; name a .pth file"),
        ("none.safetensors", "x", "no such file"),
        (artifact("v1").depth_head, "x", "holds a depth head, not a backbone; give the backbone's checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            export_huggingface(ckpt, tmp_path / out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_the_command_says_what_it_wrote(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "exports.to_huggingface", "--ckpt", str(artifact("v1").ckpt), "--out"]
    run = [
        subprocess.run([*command, str(tmp_path / "x")], cwd=repo_root, capture_output=True, text=True) for _ in range(2)
    ]
    assert [ended.returncode for ended in run] == [0, 2]
    assert run[0].stdout.startswith("written: ")
    assert run[1].stderr.startswith("error: ")
    assert run[1].stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
