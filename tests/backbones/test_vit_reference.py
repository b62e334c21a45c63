"""The ViT against numbers of the original programs (tests/reference, sections 1, 2 and 4)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.vit import Block, ViT, ViTSpec
from tests.backbones.nets import FORWARD, load_reference, sizes_in

V2_VARIANTS = ("noreg_mlp", "noreg_mlp_chunked", "reg4_mlp", "reg4_swiglu_chunked", "nols_noqkvbias")
V1_SIZES = ("native", "128x32", "48x96", "72x56", "odd", "odd_square")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **FORWARD)


def all_tokens(layer: tuple[Tensor, Tensor]) -> Tensor:
    patches, cls = layer
    return torch.cat([cls[:, None], patches], dim=1)


class TestV1:
    def test_every_size_of_the_file_is_tested(self, reference: Path) -> None:
        assert set(sizes_in(load_file(reference / "v1_vit" / "io.safetensors"))) == set(V1_SIZES)

    @pytest.mark.parametrize("size", V1_SIZES)
    def test_cls(self, reference: Path, size: str) -> None:
        backbone, io = load_reference(reference / "v1_vit")
        close(backbone.model(io[f"{size}/image"]), io[f"{size}/cls"])

    @pytest.mark.parametrize("size", ["native", "128x32", "48x96"])
    def test_tokens_and_attention(self, reference: Path, size: str) -> None:
        backbone, io = load_reference(reference / "v1_vit")
        image, attention = io[f"{size}/image"], io[f"{size}/last_selfattention"]
        close(backbone.model.tokens(image), io[f"{size}/tokens_after_pos"])
        close(backbone.model.last_selfattention(image), attention)
        # Served attention is the CLS row over patches, on the grid.
        served = backbone.model.outputs(image)
        close(served["attention"].flatten(2), attention[:, :, 0, 1:])
        assert served["attention"].shape[2:] == (image.shape[2] // 8, image.shape[3] // 8)
        close(served["embedding"], io[f"{size}/cls"])

    def test_every_block_with_the_final_norm(self, reference: Path) -> None:
        backbone, io = load_reference(reference / "v1_vit")
        layers = backbone.model.intermediate_layers(io["native/image"], n=4)
        assert len(layers) == 4
        for i, layer in enumerate(layers):
            close(all_tokens(layer), io[f"native/block{i}_normed"])
        close(backbone.model.outputs(io["native/image"])["patches"], io["native/block3_normed"][:, 1:])

    @pytest.mark.parametrize("size", ["128x32", "48x96"])
    def test_last_two_layers(self, reference: Path, size: str) -> None:
        backbone, io = load_reference(reference / "v1_vit")
        for j, layer in enumerate(backbone.model.intermediate_layers(io[f"{size}/image"], n=2)):
            close(all_tokens(layer), io[f"{size}/intermediate_n2/{j}"])


@pytest.mark.parametrize("variant", V2_VARIANTS)
class TestV2:
    def test_tokens_at_every_size_masked_and_not(self, reference: Path, variant: str) -> None:
        backbone, io = load_reference(reference / "v2_vit" / variant)
        compared = 0
        for size in sizes_in(io):
            image = io[f"{size}/image"]
            for prefix, masks in ((size, None), (f"{size}/masked", io.get(f"{size}/masked/masks"))):
                if f"{prefix}/x_norm_clstoken" not in io:
                    continue
                features = backbone.model.features(image, masks)
                parts = {
                    "x_norm_clstoken": features.cls,
                    "x_norm_regtokens": features.registers,
                    "x_norm_patchtokens": features.patches,
                    "x_prenorm": features.prenorm,
                }
                wanted = {name: io[f"{prefix}/{name}"] for name in parts if f"{prefix}/{name}" in io}
                for name, tensor in wanted.items():
                    close(parts[name], tensor)
                    compared += 1
            close(backbone.model(image), io[f"{size}/x_norm_clstoken"])
        assert compared == sum("x_norm_" in name or "x_prenorm" in name for name in io)

    def test_intermediate_layers(self, reference: Path, variant: str) -> None:
        backbone, io = load_reference(reference / "v2_vit" / variant)
        compared = 0
        for call in sorted({"/".join(name.split("/")[:2]) for name in io if "/intermediate_n" in name}):
            size, n = call.split("/intermediate_n")
            image = io[f"{size}/image"]
            for j, (patches, cls) in enumerate(backbone.model.intermediate_layers(image, int(n))):
                map_BDhw = io[f"{call}/{j}/patch_map"]
                close(patches.transpose(1, 2).unflatten(2, map_BDhw.shape[2:]), map_BDhw)
                close(cls, io[f"{call}/{j}/cls"])
                compared += 2
        for j, (patches, _) in enumerate(backbone.model.intermediate_layers(io["native/image"], [0, 2], norm=False)):
            close(patches, io[f"native/intermediate_list0_2_nonorm/{j}"])
            compared += 1
        assert compared == sum("intermediate" in name for name in io)

    def test_served_attention_is_the_cls_row_over_patches(self, reference: Path, variant: str) -> None:
        backbone, io = load_reference(reference / "v2_vit" / variant)
        for size in sizes_in(io):
            image, first = io[f"{size}/image"], 1 + backbone.model.spec.registers
            attention = backbone.model.last_selfattention(image)
            served = backbone.model.outputs(image)
            close(attention.sum(dim=-1), torch.ones(attention.shape[:3]))
            close(served["attention"].flatten(2), attention[:, :, 0, first:])
            close(served["embedding"], io[f"{size}/x_norm_clstoken"])
            close(served["patches"], io[f"{size}/x_norm_patchtokens"])

    def test_the_architecture_is_inferred(self, reference: Path, variant: str) -> None:
        config = json.loads((reference / "v2_vit" / variant / "config.json").read_text())
        found, _ = load_reference(reference / "v2_vit" / variant, given={"heads": config["num_heads"]})
        architecture = found.manifest.architecture
        assert architecture["family"] == "vit"
        assert architecture["patch_px"] == config["patch_size"]
        assert architecture["width"] == config["embed_dim"]
        assert architecture["depth"] == config["depth"]
        assert architecture["img_px"] == config["img_size"]
        assert architecture["registers"] == config["num_register_tokens"]
        assert architecture["ffn"] == config["ffn_layer"].removesuffix("fused")
        assert architecture["qkv_bias"] == config["qkv_bias"]
        assert (architecture["layer_scale"] is None) == (config["init_values"] is None)
        assert architecture["mask_token"]
        # One reference network has neither registers nor the usual offset: that is no published combination, and not to be seen.
        if variant != "nols_noqkvbias":
            assert architecture["pos_offset"] == config["interpolate_offset"]
            assert architecture["pos_antialias"] == config["interpolate_antialias"]


def encoding(pos_embed: Tensor, patch_px: int, size: str, offset: float, antialias: bool) -> Tensor:
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    spec = ViTSpec(
        patch_px=patch_px,
        width=pos_embed.shape[2],
        depth=1,
        heads=1,
        img_px=side * patch_px,
        pos_offset=offset,
        pos_antialias=antialias,
    )
    model = ViT(spec)
    model.pos_embed.data = pos_embed
    H, W = (int(side) for side in size.split("x"))
    return model.position_encoding(H, W)


class TestPositionEncodings:
    @pytest.mark.parametrize("size", ["224x224", "96x96", "480x480", "480x320", "224x448", "784x64"])
    def test_v1(self, reference: Path, size: str) -> None:
        io = load_file(reference / "v1_pos_embed" / "io.safetensors")
        close(encoding(io["pos_embed"], 16, size, offset=0.1, antialias=False), io[size])

    @pytest.mark.parametrize("size", ["518x518", "224x224", "98x98", "196x322"])
    @pytest.mark.parametrize("offset", [0.0, 0.1])
    @pytest.mark.parametrize("antialias", [False, True])
    @pytest.mark.parametrize("grid", ["native37", "nativeM2"])
    def test_v2(self, reference: Path, grid: str, antialias: bool, offset: float, size: str) -> None:
        io = load_file(reference / "v2_pos_embed" / "io.safetensors")
        found = encoding(io[f"{grid}/pos_embed"], 14, size, offset, antialias)
        close(found, io[f"{grid}/aa{int(antialias)}_off{offset}/{size}"])

    def test_every_vector_is_tested(self, reference: Path) -> None:
        assert len(load_file(reference / "v1_pos_embed" / "io.safetensors")) == 6 + 1
        assert len(load_file(reference / "v2_pos_embed" / "io.safetensors")) == 2 * 2 * 2 * 4 + 2

    def test_the_same_count_of_patches_on_another_aspect_is_resampled(self, reference: Path) -> None:
        table = load_file(reference / "v1_pos_embed" / "io.safetensors")["pos_embed"]
        assert torch.equal(encoding(table, 16, "224x224", 0.1, False), table)
        assert not torch.equal(encoding(table, 16, "784x64", 0.1, False), table)


class TestStochasticDepth:
    def test_a_branch_runs_on_a_subset_of_the_batch(self, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = reference / "v2_stochastic_depth"
        config, io = json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")
        width, heads, rate = config["dim"], config["num_heads"], config["drop_path"]
        spec = ViTSpec(patch_px=8, width=width, depth=1, heads=heads, layer_scale=1.0)
        block = Block(spec, rate)
        block.load_state_dict(
            {name.removeprefix("weights/"): t for name, t in io.items() if name.startswith("weights/")}
        )
        B, T, D = io["x"].shape
        drawn = iter([io["perm_attn"], io["perm_ffn"]])
        monkeypatch.setattr(torch, "randperm", lambda n, device: next(drawn))
        close(block.train().packed(io["x"].flatten(0, 1), [(B, T)]).view(B, T, D), io["y"])
        close(block.eval().packed(io["x"].flatten(0, 1), [(B, T)]).view(B, T, D), io["y_eval"])
        close(block(io["x"]), io["y_eval"])
        drawn = iter([io["perm_attn"], io["perm_ffn"]])
        close(block.train()(io["x"]), io["y"])
