"""Heads: they fit one backbone, by content hash, and say what they are."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backbones.checkpoints import CheckpointError, Manifest, load_backbone, load_tensors, save_backbone, save_tensors
from backbones.heads import (
    DepthHead,
    DepthHeadSpec,
    DptDepthHead,
    HeadManifest,
    LinearHead,
    LinearHeadSpec,
    SegmentationHead,
    SegmentationHeadSpec,
    load_depth_head,
    load_head,
    load_segmentation_head,
    make_depth_head,
    save_head,
)
from backbones.network import Network
from backbones.resnet import ResNet, ResNetSpec
from data.errors import InputError
from tests.backbones.nets import randomise, small_vit

FITS = "a" * 64


def linear() -> LinearHead:
    head = LinearHead(LinearHeadSpec(n_classes=3, width_in=8))
    randomise(head)
    return head


def depth() -> DepthHead:
    head = DepthHead(DepthHeadSpec(width_in=128, bins=16, min_depth=0.5, max_depth=8.0))
    randomise(head)
    return head


def segmentation(layers: tuple[int, ...] = ()) -> SegmentationHead:
    head = SegmentationHead(SegmentationHeadSpec(n_classes=3, width_in=64 * max(1, len(layers)), layers=layers))
    randomise(head)
    return head


def dpt(layers: tuple[int, ...] = (0, 1, 2, 3)) -> DptDepthHead:
    head = make_depth_head(DepthHeadSpec(width_in=512, layers=layers, decoder="dpt", channels=8))
    assert isinstance(head, DptDepthHead)
    randomise(head)
    return head


class TestRoundTrip:
    def test_a_linear_head(self, tmp_path: Path) -> None:
        head = linear()
        manifest = HeadManifest(kind="", backbone_sha256=FITS, spec={}, classes=("a", "b", "c"), metrics={"top1": 0.5})
        written = save_head(tmp_path / "head.safetensors", head, manifest)
        found, read = load_head(tmp_path / "head.safetensors", FITS)
        assert read == written
        assert (read.kind, read.classes) == ("linear", ("a", "b", "c"))
        features = torch.randn(2, 8)
        assert torch.equal(found(features), head(features))

    def test_a_depth_head(self, tmp_path: Path) -> None:
        head = depth()
        save_head(tmp_path / "head.safetensors", head, HeadManifest(kind="", backbone_sha256=FITS, spec={}))
        found, read = load_head(tmp_path / "head.safetensors", FITS)
        assert read.kind == "depth"
        assert found.spec == head.spec
        inputs = torch.randn(1, 6, 64), torch.randn(1, 64), (2, 3), (16, 24)
        assert torch.equal(found(*inputs), head(*inputs))

    @pytest.mark.parametrize("head", [segmentation(), segmentation((0, 1))])
    def test_a_segmentation_head_with_the_names_of_its_classes(self, head: SegmentationHead, tmp_path: Path) -> None:
        path = tmp_path / "head.safetensors"
        manifest = HeadManifest(kind="", backbone_sha256=FITS, spec={}, classes=("floor", "wall", "bed"))
        written = save_head(path, head, manifest)
        found, read = load_segmentation_head(path, FITS)
        assert read == written
        assert (read.kind, read.classes, found.spec) == ("segmentation", ("floor", "wall", "bed"), head.spec)
        patches = torch.randn(2, 6, head.spec.width_in)
        assert torch.equal(found(patches, (2, 3), (16, 24)), head(patches, (2, 3), (16, 24)))
        save_head(path, head, HeadManifest(kind="", backbone_sha256=FITS, spec={}, classes=("floor",)))
        with pytest.raises(CheckpointError, match="names 1 classes and tells 3 apart"):
            load_segmentation_head(path, FITS)
        with pytest.raises(CheckpointError, match="is a segmentation head; wanted a depth head"):
            load_depth_head(path, FITS)

    def test_a_dpt_head_is_a_depth_head(self, tmp_path: Path) -> None:
        head = dpt()
        save_head(tmp_path / "head.safetensors", head, HeadManifest(kind="", backbone_sha256=FITS, spec={}))
        found, read = load_depth_head(tmp_path / "head.safetensors", FITS)
        assert (read.kind, found.spec) == ("depth", head.spec)
        inputs = torch.randn(2, 6, 256), torch.randn(2, 256), (2, 3), (16, 24)
        assert torch.equal(found(*inputs), head(*inputs))


class TestStrictness:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        save_head(tmp_path / "head.safetensors", linear(), HeadManifest(kind="", backbone_sha256=FITS, spec={}))
        return tmp_path / "head.safetensors"

    def test_another_backbone_is_refused(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match="fits the backbone aaaaaaaaaaaa, not bbbbbbbbbbbb"):
            load_head(path, "b" * 64)

    def test_a_head_is_no_backbone_and_the_other_way_round(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds a linear head, not a backbone"):
            load_backbone(path)
        save_backbone(tmp_path / "net.safetensors", small_vit(), Manifest(architecture={}))
        with pytest.raises(CheckpointError, match="is a backbone, not a head"):
            load_head(tmp_path / "net.safetensors", FITS)

    def test_a_file_without_manifest(self, path: Path) -> None:
        save_file(linear().state_dict(), path)
        with pytest.raises(CheckpointError, match="has no manifest, not a head"):
            load_head(path, FITS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ([], "head.safetensors: has no manifest, not a head"),
            ({"kind": ["linear"]}, "head.safetensors: is a .*, not a head"),
            ({"backbone_sha256": 1}, "head.safetensors: backbone_sha256 in the manifest is a int, want str"),
            ({"classes": None}, "head.safetensors: classes in the manifest is a NoneType"),
            ({"surprise": 1}, "head.safetensors: this is not a head's manifest: it has .*surprise"),
            ({"spec": {"n_classes": -1, "width_in": 64}}, "head.safetensors: .*n_classes is -1; want a whole number"),
            ({"spec": {"n_classes": 3, "width_in": 10**12}}, "width_in is 1000000000000; want a whole number"),
            # Shapes are compared before memory is taken.
            ({"spec": {"n_classes": 2**24, "width_in": 2**24}}, "of another shape"),
            ({"kind": "depth", "spec": {"width_in": 64, "max_depth": math.inf}}, "a rising, non-negative range"),
        ],
    )
    def test_a_damaged_manifest_is_one_line(self, path: Path, change: Any, message: str) -> None:
        state, plain = load_tensors(path)
        save_tensors(path, state, {**(plain or {}), **change} if change else change)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_head(path, FITS)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("min_depth", "max_depth", "bins"), [(2.0, 1.0, 8), (-1.0, 1.0, 8), (1.0, 1.0, 8), (0.0, 1.0, 1)]
    )
    def test_a_depth_range_that_makes_no_sense(self, min_depth: float, max_depth: float, bins: int) -> None:
        with pytest.raises(InputError, match="want at least 2 bins over a rising"):
            DepthHeadSpec(width_in=8, min_depth=min_depth, max_depth=max_depth, bins=bins)


def slow_depth(head: DepthHead, patches_BND: torch.Tensor, cls_BD: torch.Tensor, grid: tuple[int, int]) -> list[float]:
    """Depths of a one-patch grid in plain arithmetic; resizing one cell changes nothing."""
    assert grid == (1, 1)
    depths = []
    for patch, cls in zip(patches_BND[:, 0].tolist(), cls_BD.tolist(), strict=True):
        total = weighted = 0.0
        for k, (row, bias) in enumerate(zip(head.linear.weight.tolist(), head.linear.bias.tolist(), strict=True)):
            logit = bias + sum(w * x for w, x in zip(row, patch + cls, strict=True))
            weight = max(logit, 0.0) + 0.1
            centre = head.spec.min_depth + k * (head.spec.max_depth - head.spec.min_depth) / (head.spec.bins - 1)
            total, weighted = total + weight, weighted + weight * centre
        depths.append(weighted / total)
    return depths


class TestDepth:
    def test_one_patch_is_the_weighted_mean_of_the_bins(self) -> None:
        head = depth()
        patches, cls = torch.randn(3, 1, 64), torch.randn(3, 64)
        found = head(patches, cls, (1, 1), (14, 14))
        assert found.shape == (3, 14, 14)
        for image, wanted in zip(found, slow_depth(head, patches, cls, (1, 1)), strict=True):
            assert math.isclose(image.min().item(), wanted, rel_tol=1e-5)
            assert math.isclose(image.max().item(), wanted, rel_tol=1e-5)

    def test_the_map_keeps_the_order_of_the_patches(self) -> None:
        head = depth()
        head.linear.weight.zero_()
        head.linear.bias.zero_()
        head.linear.weight[-1, 0] = 100.0  # feature 0 speaks for the farthest bin
        patches = torch.zeros(1, 6, 64)
        patches[0, 5, 0] = 1.0  # row 1, column 2
        found = head(patches, torch.zeros(1, 64), (2, 3), (20, 30))[0]
        assert divmod(int(found.argmax()), 30) >= (10, 20)
        assert found[15, 25] > found[15, 5]
        assert found[15, 25] > found[5, 25]

    def test_it_stays_within_its_range(self) -> None:
        found = depth()(torch.randn(2, 6, 64) * 50, torch.randn(2, 64) * 50, (2, 3), (28, 42))
        assert found.min() >= 0.5
        assert found.max() <= 8.0


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ((1, 0), "want numbers of blocks, rising"),
            ((0, 0), "want numbers of blocks, rising"),
            ((-1,), "want numbers of blocks"),
            ("01", "want numbers of blocks"),
            ((0, 1, 2), "does not divide into 2 x 3 parts"),
        ],
    )
    def test_layers_that_make_no_sense_are_refused(self, layers: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            DepthHeadSpec(width_in=128, layers=layers)

    def test_dpt_reads_four_layers(self) -> None:
        with pytest.raises(InputError, match="reads 4 layers"):
            DepthHeadSpec(width_in=128, layers=(0, 1), decoder="dpt")
        with pytest.raises(InputError, match="want linear or dpt"):
            DepthHeadSpec(width_in=128, decoder="deep")  # type: ignore[arg-type]

    def test_the_network_gives_depth_heads_raw_tokens_of_their_layers_and_segmentation_heads_normed_ones(self) -> None:
        vit = small_vit()
        head = DepthHead(DepthHeadSpec(width_in=256, bins=8, layers=(0, 1)))
        randomise(head)
        classes = segmentation((0, 1))
        pixels = torch.randn(2, 3, 16, 24)
        made = Network(vit, head, classes)(pixels)
        raw, normed = (vit.intermediate_layers(pixels, (0, 1), norm=norm) for norm in (False, True))
        patches, cls = (torch.cat([layer[k] for layer in raw], dim=-1) for k in (0, 1))
        assert torch.equal(made["depth"], head(patches, cls, (2, 3), (16, 24)))
        patches = torch.cat([layer[0] for layer in normed], dim=-1)
        assert torch.equal(made["classes"], classes(patches, (2, 3), (16, 24)))

    def test_a_layer_that_the_backbone_lacks_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"reads blocks \[0, 9\], this backbone has blocks 0 to 1"):
            Network(small_vit(), segmentation_head=segmentation((0, 9)))
        resnet = ResNet(ResNetSpec()).eval()
        with pytest.raises(InputError, match="this backbone has no blocks"):
            Network(resnet, segmentation_head=segmentation((0,)))


class TestDpt:
    def test_it_reads_any_grid_odd_ones_too_and_stays_within_its_range(self) -> None:
        head = dpt()
        for h, w in ((1, 1), (3, 5), (4, 4)):
            found = head(torch.randn(2, h * w, 256) * 30, torch.randn(2, 256), (h, w), (8 * h, 8 * w))
            assert found.shape == (2, 8 * h, 8 * w)
            assert found.min() >= head.spec.min_depth - 1e-6
            assert found.max() <= head.spec.max_depth + 1e-6

    def test_each_layer_matters(self) -> None:
        head = dpt()
        head.decoder.last.bias.data.fill_(3.0)  # away from the floor
        patches, cls = torch.randn(1, 6, 256), torch.randn(1, 256)
        plain = head(patches, cls, (2, 3), (16, 24))
        for level in range(4):
            changed = patches.clone()
            changed[:, :, 64 * level : 64 * (level + 1)] += 1.0
            assert not torch.allclose(head(changed, cls, (2, 3), (16, 24)), plain)


class TestSegmentation:
    def test_each_pixel_gets_the_largest_of_the_enlarged_logits(self) -> None:
        head = segmentation()
        patches = torch.randn(2, 6, 64)
        found = head(patches, (2, 3), (8, 12))
        assert (found.shape, found.dtype) == ((2, 8, 12), torch.int32)
        # the centre of a patch lies between pixels, so the corners, which are flat, tell the patch's own class
        for y, x, patch in ((0, 0, 0), (0, -1, 2), (-1, 0, 3), (-1, -1, 5)):
            logits = patches[:, patch] @ head.linear.weight.T + head.linear.bias
            assert found[:, y, x].tolist() == logits.argmax(dim=1).tolist()


class TestNetwork:
    def test_a_vit_with_depth_and_classes(self) -> None:
        network = Network(small_vit(), depth(), segmentation())
        outputs = network(torch.randn(2, 3, 16, 24))
        assert tuple(outputs) == network.output_names == ("embedding", "patches", "attention", "depth", "classes")
        assert (outputs["classes"].shape, outputs["classes"].dtype) == ((2, 16, 24), torch.int32)

    def test_a_vit_with_depth(self) -> None:
        network = Network(small_vit(), depth())
        outputs = network(torch.randn(2, 3, 16, 24))
        assert tuple(outputs) == network.output_names == ("embedding", "patches", "attention", "depth")
        shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in outputs.items()}
        assert shapes == {"embedding": (2, 64), "patches": (2, 6, 64), "attention": (2, 1, 2, 3), "depth": (2, 16, 24)}

    def test_a_resnet_has_no_attention(self) -> None:
        network = Network(ResNet(ResNetSpec()).eval())
        assert tuple(network(torch.randn(1, 3, 32, 32))) == network.output_names == ("embedding", "patches")

    def test_a_depth_head_of_another_width_is_refused(self) -> None:
        head = DepthHead(DepthHeadSpec(width_in=100))
        with pytest.raises(InputError, match="takes 100 features, this backbone gives 128"):
            Network(small_vit(), head)
