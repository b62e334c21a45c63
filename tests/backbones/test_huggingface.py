"""Hugging Face folders against numbers of transformers and of the original programs (tests/reference, section 11)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbones.checkpoints import CheckpointError, load_backbone
from backbones.huggingface import load_huggingface
from backbones.vit import ViT
from data.preprocess import Preprocess
from tests.backbones.nets import FORWARD, load_reference

MODELS = ("dinov2", "dinov2_swiglu", "dinov2_registers", "vit_dinov1")
CONVERTED = {"converted_noreg_mlp": ("noreg_mlp", "56x98"), "converted_reg4_mlp": ("reg4_mlp", "56x84")}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **FORWARD)


def normed_tokens(model: Any, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
    """All tokens after the final norm, as `last_hidden_state`."""
    features = model.features(pixels, masks)
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def resized_by_size(model: Any) -> ViT:
    """The same weights, position encodings resized as transformers does."""
    other = ViT(dataclasses.replace(model.spec, pos_offset=0.0))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_every_model_is_tested(reference: Path) -> None:
    assert {folder.name for folder in (reference / "hf").iterdir()} == {*MODELS, *CONVERTED}


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_native_size(self, reference: Path, name: str) -> None:
        model: Any = load_backbone(reference / "hf" / name).model
        io = load_file(reference / "hf" / name / "io.safetensors")
        pixels = io["native/pixel_values"]
        close(normed_tokens(model, pixels), io["native/last_hidden_state"])
        close(model.tokens(pixels), io["native/hidden_state_embeddings"])
        close(model.last_selfattention(pixels), io["native/last_attention"])
        first = 1 + model.spec.registers
        close(model.outputs(pixels)["attention"].flatten(2), io["native/last_attention"][:, :, 0, first:])
        close(model.features(pixels).prenorm, io["native/hidden_state_last"])

    def test_masked(self, reference: Path, name: str) -> None:
        model: Any = load_backbone(reference / "hf" / name).model
        io = load_file(reference / "hf" / name / "io.safetensors")
        assert ("native/bool_masked_pos" in io) == model.spec.mask_token
        if model.spec.mask_token:
            found = normed_tokens(model, io["native/pixel_values"], io["native/bool_masked_pos"])
            close(found, io["native/last_hidden_state_masked"])

    def test_other_size(self, reference: Path, name: str) -> None:
        """Without registers the official networks resample by scale factor, transformers by size; we follow the official.

        So ours departs from transformers' there, and by that alone: with its resizing, every number is met.
        """
        model: Any = load_backbone(reference / "hf" / name).model
        io = load_file(reference / "hf" / name / "io.safetensors")
        (size,) = {key.split("/")[0] for key in io} - {"native"}
        pixels, wanted = io[f"{size}/pixel_values"], io[f"{size}/last_hidden_state"]
        close(normed_tokens(resized_by_size(model), pixels), wanted)
        if model.spec.registers:
            close(normed_tokens(model, pixels), wanted)
        else:
            assert model.spec.pos_offset == 0.1
            assert (normed_tokens(model, pixels) - wanted).abs().max() > 1e-3

    def test_dinov2_pools_the_cls_token(self, reference: Path, name: str) -> None:
        if name.startswith("dinov2"):
            io = load_file(reference / "hf" / name / "io.safetensors")
            close(load_backbone(reference / "hf" / name).model(io["native/pixel_values"]), io["native/pooler_output"])


@pytest.mark.parametrize("name", CONVERTED)
class TestConverted:
    def test_it_is_the_official_network(self, reference: Path, name: str) -> None:
        variant, _ = CONVERTED[name]
        found = load_backbone(reference / "hf" / name)
        official, io = load_reference(reference / "v2_vit" / variant)
        assert found.model.spec == official.model.spec
        assert found.manifest.weights_sha256 == official.manifest.weights_sha256
        for size in {key.split("/")[0] for key in io}:
            close(found.model(io[f"{size}/image"]), io[f"{size}/x_norm_clstoken"])

    def test_its_distance_to_transformers_is_the_recorded_one(self, reference: Path, name: str) -> None:
        variant, size = CONVERTED[name]
        folder = reference / "hf" / name
        recorded = json.loads((folder / "official_vs_hf.json").read_text())
        transformers, images = (
            load_file(folder / "io.safetensors"),
            load_file(reference / "v2_vit" / variant / "io.safetensors"),
        )
        model = load_backbone(folder).model
        close(model(images["native/image"]), transformers["pooler_output_native"])
        distance = (model(images[f"{size}/image"]) - transformers[f"pooler_output_{size}"]).abs().max().item()
        assert distance == pytest.approx(recorded[f"{size}_max_abs_diff_cls"], abs=2e-5)


@pytest.fixture
def folder(tmp_path: Path, reference: Path) -> Path:
    """A copy of the DINOv2 folder, to be changed."""
    shutil.copytree(reference / "hf" / "dinov2", tmp_path / "net")
    return tmp_path / "net"


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **fields}))


class TestLayouts:
    def test_the_manifest_says_what_is_known(self, folder: Path) -> None:
        manifest = load_huggingface(folder).manifest
        assert manifest.source == "net"
        assert manifest.preprocess == Preprocess(size_px=224, resize_px=256, whole_px=224)

    def test_shards(self, folder: Path) -> None:
        whole = load_huggingface(folder).manifest.weights_sha256
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(state))}
        for file in set(files.values()):
            save_file({key: state[key] for key in state if files[key] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert load_huggingface(folder).manifest.weights_sha256 == whole

        victim = sorted(state)[0]
        save_file(
            {key: state[key] for key in state if files[key] == files[victim] and key != victim}, folder / files[victim]
        )
        with pytest.raises(CheckpointError, match=f"1 weights are in none of its files, first {victim}"):
            load_huggingface(folder)

    @pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", 3])
    def test_names_of_shards_never_leave_the_folder(self, folder: Path, file: Any) -> None:
        shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layernorm.weight": file}}))
        with pytest.raises(CheckpointError, match="does not name files of this folder"):
            load_huggingface(folder)

    @pytest.mark.parametrize("prefix", ["", "dinov2."])
    def test_a_classifier_is_left_aside(self, folder: Path, prefix: str) -> None:
        plain = load_huggingface(folder).manifest.weights_sha256
        state = {f"{prefix}{key}": weight for key, weight in load_file(folder / "model.safetensors").items()}
        save_file({**state, "classifier.weight": torch.ones(2, 48)}, folder / "model.safetensors")
        assert load_huggingface(folder).manifest.weights_sha256 == plain

    def test_the_pooler_is_left_aside(self, folder: Path, reference: Path) -> None:
        assert "pooler.dense.weight" in load_file(reference / "hf" / "vit_dinov1" / "model.safetensors")
        assert not [key for key in load_backbone(reference / "hf" / "vit_dinov1").model.state_dict() if "pooler" in key]

    def test_older_shards_are_pickles_of_plain_weights(self, folder: Path) -> None:
        wanted, state = load_huggingface(folder).manifest.weights_sha256, load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(state)
        parts = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert load_huggingface(folder).manifest.weights_sha256 == wanted

    def test_older_folders_hold_a_pickle_of_plain_weights(self, folder: Path) -> None:
        plain = load_huggingface(folder).manifest.weights_sha256
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert load_huggingface(folder).manifest.weights_sha256 == plain


class TestPreprocessing:
    def test_as_dinov2_publishes_it(self, folder: Path) -> None:
        change_json(
            folder / "preprocessor_config.json",
            do_center_crop=True,
            crop_size={"height": 224, "width": 224},
            size={"shortest_edge": 256},
            resample=3,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.2, 0.3, 0.4],
            rescale_factor=0.00392156862745098,
        )
        wanted = Preprocess(
            size_px=224, resize_px=256, whole_px=224, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic"
        )
        assert load_huggingface(folder).manifest.preprocess == wanted

    def test_as_vit_publishes_it(self, folder: Path) -> None:
        change_json(folder / "preprocessor_config.json", do_resize=True, size=196, resample=2, do_normalize=False)
        found = load_huggingface(folder).manifest.preprocess
        assert (found.size_px, found.resize_px, found.whole_px, found.interpolation) == (196, 196, 196, "bilinear")
        assert (found.mean, found.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"size": {"height": 224, "width": 112}}, "a size is"),
            ({"size": None}, "a size is None"),
            ({"size": 224, "resample": 0}, "resample is 0"),
            ({"size": 224, "rescale_factor": 1.0}, r"rescale_factor is 1\.0"),
            ({"size": 224, "rescale_factor": "x"}, r"preprocessor_config\.json: rescale_factor is 'x', want 1/255"),
            ({"size": 224, "resample": [3]}, r"preprocessor_config\.json: resample is \[3\], want 2"),
            ({"size": {"shortest_edge": {"a": 1}}}, r"preprocessor_config\.json: a size is"),
            ({"size": {"longest_edge": 224}}, r"preprocessor_config\.json: a size is {'longest_edge': 224}"),
            (
                {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224},
                "squashed to {'height': 256",
            ),
            ({"size": 224, "do_rescale": False}, "do_rescale is off"),
        ],
    )
    def test_what_cannot_be_expressed_is_an_error(self, folder: Path, fields: dict[str, Any], message: str) -> None:
        change_json(folder / "preprocessor_config.json", **fields)
        with pytest.raises(CheckpointError, match=message):
            load_huggingface(folder)


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model_type": "clip"}, "model type is 'clip'"),
            ({"num_attention_heads": None}, "num_attention_heads None"),
            ({"num_attention_heads": 7}, "net: ViT width 24 does not divide into 7 heads"),
            ({"num_hidden_layers": 4}, r"14 weights are missing, first blocks\.3\.attn"),
            ({"num_hidden_layers": 2}, r"14 weights are unknown, first blocks\.2\.attn"),
            ({"hidden_size": 48}, "of another shape"),
            ({"image_size": 84}, r"pos_embed is \[1, 26, 24\], want \[1, 37, 24\]"),
            ({"use_swiglu_ffn": True}, r"missing, first blocks\.0\.mlp\.w12\.bias"),
            ({"hidden_act": "relu"}, "hidden_act 'relu'"),
            ({"layerscale_value": None}, r"net: config\.json has layerscale_value None, want a number"),
            ({"layer_norm_eps": 1e-3}, r"layer_norm_eps 0\.001"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, folder: Path, fields: dict[str, Any], message: str) -> None:
        change_json(folder / "config.json", **fields)
        with pytest.raises(CheckpointError, match=message):
            load_huggingface(folder)

    def test_a_missing_part_of_the_attention_is_named(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state["encoder.layer.1.attention.attention.key.bias"]
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"the key of blocks\.1\.attn\.qkv\.bias is missing"):
            load_huggingface(folder)

    def test_weights_that_are_bare_numbers_are_one_line(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state |= {name: torch.tensor(1.0) for name in state if "attention.attention" in name}
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="net: its weights do not make a network"):
            load_huggingface(folder)

    def test_an_unknown_weight_is_named(self, folder: Path) -> None:
        save_file(
            {**load_file(folder / "model.safetensors"), "encoder.extra": torch.ones(1)}, folder / "model.safetensors"
        )
        with pytest.raises(CheckpointError, match=r"1 weights are unknown, first encoder\.extra"):
            load_huggingface(folder)

    @pytest.mark.parametrize("content", ["", "not json", "[1, 2]", "[" * 100_000])
    def test_a_damaged_configuration(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_huggingface(folder)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_a_missing_file(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=file):
            load_huggingface(folder)
