"""Sizes of the published ViTs, and what a ViT refuses. Its numbers are held in test_vit_reference.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones.vit import VIT_SIZES, ViT, ViTSpec, swiglu_hidden
from data.errors import InputError
from tests.backbones.nets import small_vit

DINOV1 = {"patch_px": 16, "img_px": 224}
DINOV2 = {"patch_px": 14, "img_px": 518, "layer_scale": 1.0, "mask_token": True}


@pytest.mark.parametrize(
    ("size", "fields", "n_parameters"),
    [
        ("tiny", DINOV1, 5_524_416),
        ("small", DINOV1, 21_665_664),
        ("base", DINOV1, 85_798_656),
        ("small", {**DINOV1, "patch_px": 8}, 21_670_272),
        ("base", {**DINOV1, "patch_px": 8}, 85_807_872),
        ("small", DINOV2, 22_056_576),
        ("base", DINOV2, 86_580_480),
        ("large", DINOV2, 304_368_640),
        ("giant2", {**DINOV2, "ffn": "swiglu"}, 1_136_480_768),
        ("giant2", {**DINOV2, "ffn": "swiglu", "registers": 4}, 1_136_486_912),
    ],
)
def test_sizes_are_the_published_ones(size: str, fields: dict[str, Any], n_parameters: int) -> None:
    width, depth, heads = VIT_SIZES[size]
    with torch.device("meta"):
        model = ViT(ViTSpec(width=width, depth=depth, heads=heads, **fields))
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_swiglu_is_two_thirds_as_wide_in_multiples_of_8() -> None:
    assert [swiglu_hidden(width) for width in (1536, 384, 36, 24)] == [4096, 1024, 96, 64]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "width 64 does not divide into 5 heads"),
        ({"depth": 0}, "depth is 0; want a whole number, at least 1"),
        ({"img_px": 4}, "img_px 4 is smaller than one patch of 8 px"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0; want 0 <= drop_path < 1"),
    ],
)
def test_a_specification_that_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_vit(**fields)


def test_masks_need_a_mask_token() -> None:
    with pytest.raises(InputError, match="no mask token"):
        small_vit().features(torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.bool))


@pytest.mark.parametrize("wanted", [0, 3, [2], [-1], []])
def test_blocks_that_are_not_there(wanted: Any) -> None:
    with pytest.raises(InputError, match="this backbone has blocks 0 to 1"):
        small_vit(depth=2).intermediate_layers(torch.zeros(1, 3, 32, 32), wanted)


def test_a_masked_patch_does_not_show() -> None:
    model, pixels = small_vit(mask_token=True), torch.randn(1, 3, 32, 32)
    other = pixels.clone()
    other[:, :, :8, 8:16] = 7.0  # patch 1
    masks = torch.zeros(1, 16, dtype=torch.bool)
    assert not torch.allclose(model.features(pixels, masks).cls, model.features(other, masks).cls)
    masks[0, 1] = True
    assert torch.equal(model.features(pixels, masks).cls, model.features(other, masks).cls)


def test_every_image_of_a_batch_stands_alone() -> None:
    model, pixels = small_vit(registers=2), torch.randn(3, 3, 48, 32)
    batch = model.outputs(pixels)
    for i in range(3):
        for name, tensor in model.outputs(pixels[i : i + 1]).items():
            torch.testing.assert_close(batch[name][i : i + 1], tensor, atol=1e-5, rtol=1e-4)


class TestStochasticDepth:
    def test_evaluation_keeps_every_branch(self) -> None:
        pixels = torch.randn(2, 3, 32, 32)
        assert torch.equal(small_vit(drop_path=0.9)(pixels), small_vit()(pixels))

    def test_training_skips_the_branches_of_some_samples_and_scales_the_others(self) -> None:
        block = small_vit(depth=2, drop_path=0.5).train().blocks[1]
        torch.manual_seed(0)
        dropped = block._add(torch.full((4000, 1, 1), 3.0), torch.ones(4000, 1, 1)) - 3
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert abs(dropped.mean().item() - 1.0) < 0.1

    def test_the_rate_grows_over_the_depth(self) -> None:
        rates = [block.drop_path for block in small_vit(depth=5, drop_path=0.2).blocks]
        assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])

    def test_the_rate_may_be_the_same_everywhere(self) -> None:
        rates = [block.drop_path for block in small_vit(depth=3, drop_path=0.2, drop_path_uniform=True).blocks]
        assert rates == pytest.approx([0.2, 0.2, 0.2])


class TestPackedSequences:
    def test_crops_of_two_sizes_in_one_pass_give_what_each_gives_alone(self) -> None:
        model = small_vit(registers=2, mask_token=True)
        crops, masks = [torch.randn(3, 3, 32, 32), torch.randn(5, 3, 16, 24)], torch.rand(3, 16) < 0.5
        for found, pixels, mask in zip(model.packed_features(crops, [masks, None]), crops, [masks, None], strict=True):
            alone = model.features(pixels, mask)
            for name in ("cls", "registers", "patches", "prenorm"):
                torch.testing.assert_close(getattr(found, name), getattr(alone, name), atol=2e-5, rtol=1e-4)

    def test_skipped_samples_keep_what_they_had(self) -> None:
        block = small_vit(depth=1, drop_path=0.5, drop_path_uniform=True).train().blocks[0]
        x_SD = torch.randn(4 * 5 + 6 * 2, 64)
        rows, gains, kept = block._subset([(4, 5), (6, 2)], x_SD.device)
        assert kept == [(2, 5), (3, 2)]
        assert gains.unique().tolist() == [2.0]
        moved = torch.zeros(len(x_SD), dtype=torch.bool).index_fill(0, rows, True)
        assert moved[:20].view(4, 5).all(dim=1).sum() == 2, "whole samples of the first group"
        assert moved[20:].view(6, 2).all(dim=1).sum() == 3, "and of the second"

    def test_at_least_one_sample_of_each_group_takes_the_branch(self) -> None:
        block = small_vit(depth=1, drop_path=0.9, drop_path_uniform=True).train().blocks[0]
        assert block._subset([(1, 5), (2, 3)], torch.device("cpu"))[2] == [(1, 5), (1, 3)]


class TestTokensThatAreRead:
    """The last block computes only what is read: the same values and gradients as of all tokens."""

    @pytest.mark.parametrize("drop_path", [0.0, 0.05, 0.5])
    @pytest.mark.parametrize("layer_scale", [None, 0.3])
    def test_cls_alone_is_that_of_all_tokens(self, drop_path: float, layer_scale: float | None) -> None:
        model = small_vit(registers=2, drop_path=drop_path, drop_path_uniform=True, layer_scale=layer_scale).train()
        pixels = torch.randn(6, 3, 32, 32)
        same_with_gradients(model, lambda: model(pixels), lambda: model.features(pixels).cls)

    @pytest.mark.parametrize("drop_path", [0.0, 0.5])
    @pytest.mark.parametrize("qkv_bias", [True, False])
    def test_cls_and_chosen_patches_are_those_of_all_tokens(self, drop_path: float, qkv_bias: bool) -> None:
        """Some crops have no chosen patch, and one group none at all."""
        model = small_vit(registers=2, mask_token=True, drop_path=drop_path, drop_path_uniform=True, qkv_bias=qkv_bias)
        model.train()
        crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 24)]
        hidden = torch.rand(4, 16) < 0.5
        hidden[1:3] = False

        def read() -> Tensor:
            return torch.cat(model.packed_read(crops, [hidden, None], [hidden, None]))

        def read_of_all() -> Tensor:
            found = model.packed_features(crops, [hidden, None])
            return torch.cat([*[one.cls for one in found], found[0].patches[hidden]])

        same_with_gradients(model, read, read_of_all)


def same_with_gradients(model: nn.Module, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Both ways give the same, and the same gradients of all parameters, where they draw the same."""
    model.requires_grad_()
    model.requires_grad_()
    found = []
    for way in (one, other):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.enable_grad():
            value = way()
            (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((value.detach(), gradients))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)
