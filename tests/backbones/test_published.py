"""Published .pth files: training checkpoints of the original programs (tests/reference, section 3 and 4), and files not to be trusted."""

import argparse
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.checkpoints import CheckpointError, load_backbone, weights_sha256
from backbones.infer import infer_architecture
from backbones.published import backbone_from_state, clean_state, load_published, read_pickle, usual_preprocess
from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import VIT_SIZES
from data.preprocess import Preprocess
from tests.backbones.nets import FORWARD, randomise, small_vit
from training.projection_head import HeadSpec, ProjectionHead


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **FORWARD)


def projection_head(state: dict[str, Any], prefix: str) -> ProjectionHead:
    """The head under `prefix` of a training checkpoint."""
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    (hidden, width), (prototypes, bottleneck) = weights["mlp.0.weight"].shape, weights["last_layer.weight_v"].shape
    head = ProjectionHead(width, HeadSpec(prototypes=prototypes, hidden=hidden, bottleneck=bottleneck))
    head.load_state_dict(weights)
    return head


class TestV1Checkpoint:
    @pytest.fixture
    def path(self, reference: Path) -> Path:
        return reference / "v1_checkpoint" / "checkpoint.pth"

    @pytest.fixture
    def vectors(self, reference: Path) -> dict[str, Tensor]:
        return load_file(reference / "v1_checkpoint" / "io.safetensors")

    def test_the_teacher_is_loaded(self, path: Path, vectors: dict[str, Tensor]) -> None:
        backbone = load_backbone(path)
        close(backbone.model(vectors["image"]), vectors["teacher_backbone_cls"])
        head = projection_head(read_pickle(path)["teacher"], "head.")
        close(head(backbone.model(vectors["image"])), vectors["teacher_head_out"])

    def test_the_settings_name_the_number_of_heads(self, path: Path) -> None:
        # Width 36 does not tell it; `args` says vit_tiny.
        assert load_backbone(path).manifest.architecture["heads"] == VIT_SIZES["tiny"][2]

    def test_the_student_is_read_by_the_same_steps(self, path: Path, vectors: dict[str, Tensor]) -> None:
        weights = read_pickle(path)["student"]
        state = clean_state(weights, path)
        model = backbone_from_state(state, infer_architecture(state, {"heads": 3}, path), path, source="student").model
        close(model(vectors["image"]), vectors["student_backbone_cls"])
        head = projection_head(weights, "module.head.")
        close(head(model(vectors["image"])), vectors["student_head_out"])
        image, local = vectors["image"], vectors["local_image"]
        cls = torch.cat([model(torch.cat([image, image.flip(0)])), model(torch.cat([local, local.flip(0)]))])
        close(head(cls), vectors["student_multicrop_out"])

    def test_the_manifest_says_what_is_known(self, path: Path) -> None:
        backbone = load_backbone(path)
        assert backbone.manifest.source == "checkpoint.pth"
        assert backbone.manifest.weights_sha256 == weights_sha256(backbone.model.state_dict())
        assert backbone.manifest.preprocess == Preprocess(size_px=224, resize_px=256, whole_px=224)
        assert not backbone.model.training
        assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}


class TestV2Checkpoint:
    @pytest.fixture
    def path(self, reference: Path) -> Path:
        return reference / "v2_checkpoint" / "teacher_checkpoint.pth"

    def test_chunked_blocks_and_both_heads(self, path: Path, reference: Path) -> None:
        vectors = load_file(reference / "v2_checkpoint" / "io.safetensors")
        weights = read_pickle(path)["teacher"]
        features = load_published(path, architecture={"heads": 3}).model.features(vectors["image"])  # type: ignore[operator]
        close(features.cls, vectors["x_norm_clstoken"])
        close(features.patches, vectors["x_norm_patchtokens"])
        close(projection_head(weights, "dino_head.")(features.cls), vectors["dino_head_out"])
        close(projection_head(weights, "ibot_head.")(features.patches), vectors["ibot_head_out"])

    def test_heads_that_nothing_tells_are_asked_for(self, path: Path) -> None:
        with pytest.raises(
            CheckpointError,
            match=r'do not tell the number of heads, and a width of 24 .*"heads": .* to teacher_checkpoint\.architecture\.json',
        ):
            load_backbone(path)

    @pytest.mark.parametrize(
        ("stated", "message"),
        [
            ('{"heads": 3}', None),
            ('{"heads": "3"}', "ViT heads is '3'"),
            ('{"wings": 2, "heads": 3}', r"unknown fields \['wings'\]"),
            ("[3]", r"net\.architecture\.json: holds a list"),
            ("[" * 100_000, r"net\.architecture\.json: is not readable as JSON"),
        ],
        ids=range(5),
    )
    def test_heads_may_be_stated_beside_the_file(
        self, path: Path, tmp_path: Path, stated: str, message: str | None
    ) -> None:
        shutil.copy(path, tmp_path / "net.pth")
        (tmp_path / "net.architecture.json").write_text(stated)
        if message is None:
            assert load_backbone(tmp_path / "net.pth").manifest.architecture["heads"] == 3
            return
        with pytest.raises(CheckpointError, match=message):
            load_backbone(tmp_path / "net.pth")


class TestLayouts:
    """One network in every published layout comes out the same."""

    @pytest.mark.parametrize(
        "pack",
        [
            lambda state: state,
            lambda state: {"model": state},
            lambda state: {"teacher": {f"backbone.{k}": v for k, v in state.items()}},
            lambda state: {"student": {f"module.backbone.{k}": v for k, v in state.items()}, "epoch": 3},
            lambda state: {"teacher": {**{f"backbone.{k}": v for k, v in state.items()}, "dino_head.x": torch.ones(2)}},
            lambda state: {**state, "head.last_layer.weight_g": torch.ones(3, 1)},
        ],
        ids=["bare", "model", "teacher", "student", "teacher with head", "bare with head"],
    )
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_layout(self, tmp_path: Path, pack: Any, legacy: bool) -> None:
        model = small_vit(
            registers=4, ffn="swiglu", layer_scale=1.0, mask_token=True, pos_offset=0.0, pos_antialias=True
        )
        torch.save(pack(model.state_dict()), tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
        found = load_backbone(tmp_path / "net.pth")
        assert found.model.spec == model.spec
        assert weights_sha256(found.model.state_dict()) == weights_sha256(model.state_dict())

    @pytest.mark.parametrize("chunk", [1, 2, 3])
    def test_chunked_blocks(self, tmp_path: Path, chunk: int) -> None:
        model = small_vit(depth=5)

        def chunked(name: str) -> str:
            parts = name.split(".")
            return ".".join(["blocks", str(int(parts[1]) // chunk), *parts[1:]]) if parts[0] == "blocks" else name

        torch.save({chunked(name): weight for name, weight in model.state_dict().items()}, tmp_path / "net.pth")
        assert weights_sha256(load_backbone(tmp_path / "net.pth").model.state_dict()) == weights_sha256(
            model.state_dict()
        )

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_both_networks_side_by_side_give_the_teacher(self, tmp_path: Path, wrapped: bool) -> None:
        teacher, student = small_vit().state_dict(), small_vit(depth=1).state_dict()
        both = {f"student.backbone.{name}": weight for name, weight in student.items()}
        both |= {f"teacher.backbone.{name}": weight for name, weight in teacher.items()}
        both["teacher.dino_head.last_layer.weight_g"] = torch.ones(3, 1)
        torch.save({"model": both} if wrapped else both, tmp_path / "net.pth")
        assert load_backbone(tmp_path / "net.pth").model.spec.depth == 2

    def test_half_precision_becomes_float32(self, tmp_path: Path) -> None:
        torch.save({k: v.half() for k, v in small_vit().state_dict().items()}, tmp_path / "net.pt")
        assert {t.dtype for t in load_backbone(tmp_path / "net.pt").model.state_dict().values()} == {torch.float32}

    @pytest.mark.parametrize(("registers", "offset"), [(0, 0.1), (4, 0.0)])
    def test_positions_are_resampled_as_the_publishers_do(self, tmp_path: Path, registers: int, offset: float) -> None:
        torch.save(small_vit(registers=registers).state_dict(), tmp_path / "net.pth")
        spec = load_backbone(tmp_path / "net.pth").model.spec
        assert spec.pos_offset == offset  # type: ignore[union-attr]
        assert spec.pos_antialias == bool(registers)  # type: ignore[union-attr]

    def test_a_resnet_without_its_classifier(self, tmp_path: Path) -> None:
        model = ResNet(ResNetSpec())
        randomise(model)
        state = {name: weight for name, weight in model.state_dict().items() if "num_batches" not in name}
        torch.save({**state, "fc.weight": torch.ones(10, 2048), "fc.bias": torch.ones(10)}, tmp_path / "r50.pth")
        found = load_backbone(tmp_path / "r50.pth")
        assert found.manifest.architecture == {"family": "resnet", "depth": 50}
        assert weights_sha256(found.model.state_dict()) == weights_sha256(model.state_dict())

    @pytest.mark.parametrize(("patch_px", "side"), [(8, 224), (14, 224), (16, 224), (32, 224), (10, 220), (300, 300)])
    def test_views_are_whole_patches(self, patch_px: int, side: int) -> None:
        pre = usual_preprocess(patch_px)
        assert (pre.size_px, pre.whole_px) == (side, side)
        assert abs(pre.resize_px - side * 256 / 224) <= 0.5


def genuine_checkpoint(reference: Path) -> dict[str, Any]:
    """What a DINOv1 run really stores: settings as a Namespace, and an optimiser whose rates are NumPy scalars."""
    plain = read_pickle(reference / "v1_checkpoint" / "checkpoint.pth")
    optimizer = {
        "state": {0: {"step": 1}},
        "param_groups": [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04)}],
    }
    settings = argparse.Namespace(**plain["args"], lr=5e-4, local_crops_scale=(0.05, 0.4))
    return {**plain, "args": settings, "optimizer": optimizer, "fp16_scaler": {"scale": 65536.0}}


class TestGenuineFiles:
    def test_settings_and_optimiser_may_be_there(self, tmp_path: Path, reference: Path) -> None:
        torch.save(genuine_checkpoint(reference), tmp_path / "full.pth")
        plain = load_backbone(reference / "v1_checkpoint" / "checkpoint.pth")
        assert load_backbone(tmp_path / "full.pth").manifest.weights_sha256 == plain.manifest.weights_sha256

    def test_scalars_may_be_written_by_numpy_1(self, tmp_path: Path, reference: Path) -> None:
        torch.save(genuine_checkpoint(reference), tmp_path / "new.pth")
        with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
            for name in new.namelist():
                content = new.read(name)
                if name.endswith("data.pkl"):
                    assert b"numpy._core.multiarray" in content
                    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                old.writestr(name, content)
        assert load_backbone(tmp_path / "old.pth").manifest.architecture["heads"] == 3


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


class TestHostileFiles:
    @pytest.mark.parametrize("place", ["alone", "among weights", "in settings"])
    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
    def test_nothing_is_executed(self, tmp_path: Path, place: str, form: str) -> None:
        target, path = tmp_path / "made", tmp_path / "net.pth"
        content: Any = Hostile(target)
        if place == "among weights":
            content = {**small_vit().state_dict(), "norm.bias": content}
        if place == "in settings":
            content = {"teacher": small_vit().state_dict(), "args": argparse.Namespace(arch=content)}
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        with pytest.raises(CheckpointError, match=r"net\.pth") as caught:
            load_backbone(path)
        assert not target.exists()
        assert "\n" not in str(caught.value)

    def test_the_hostile_pickle_would_work_elsewhere(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Hostile(tmp_path / "made")))
        assert (tmp_path / "made").is_dir()


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class TestDamagedFiles:
    @pytest.mark.parametrize(
        "content",
        [b"", b"<html>404 not found</html>\n", b"\x80\x02", bytes(1000), saved(small_vit().state_dict())[:5000]],
        ids=["empty", "text", "pickle cut", "zeros", "cut short"],
    )
    @pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.safetensors"])
    def test_one_line_names_the_file(self, tmp_path: Path, content: bytes, name: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            load_backbone(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_the_reason_is_ours_and_not_advice_to_programmers(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(9)}, tmp_path / "cut.pth")
        cut = (tmp_path / "cut.pth").read_bytes()[:-30]
        for content in (b"<html>404 not found</html>\n", pickle.dumps({"path": tmp_path}), cut):
            (tmp_path / "net.pth").write_bytes(content)
            with pytest.raises(CheckpointError) as caught:
                load_backbone(tmp_path / "net.pth")
            said = str(caught.value)
            assert "\x1b" not in said
            assert not any(
                word in said
                for word in ("internal miniz", "torch.load", "weights_only", "add_safe_globals", "PyTorch 2.6")
            )

    @pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "nothing"])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match=name):
            load_backbone(tmp_path / name)

    @pytest.mark.parametrize("content", [[1, 2], {}, {1: torch.ones(1)}, {"epoch": 3}, torch.ones(2), "text"])
    def test_content_that_is_no_network(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "net.pth")
        with pytest.raises(CheckpointError, match=r"net\.pth: "):
            load_backbone(tmp_path / "net.pth")


class TestStrictness:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"1 weights are missing, first blocks\.1\.mlp\.fc2\.bias"),
            (lambda s: s.pop("norm.weight"), r"1 weights are missing, first norm\.weight"),
            (lambda s: s.pop("patch_embed.proj.weight"), r"no weight patch_embed\.proj\.weight"),
            (lambda s: s.pop("pos_embed"), "no weight pos_embed"),
            (lambda s: s.update(extra=torch.ones(1)), "1 weights are unknown, first extra"),
            (lambda s: s.update(cls_token=torch.ones(1, 1, 5)), r"cls_token is \[1, 1, 5\], want \[1, 1, 64\]"),
            (lambda s: s.update(pos_embed=torch.ones(1, 12, 64)), "pos_embed has 12 rows"),
            (lambda s: s.update(pos_embed=torch.ones(64)), r"pos_embed is \[64\], want 3 axes"),
            (lambda s: s.update({"norm.bias": torch.ones(64).int()}), r"norm\.bias is torch\.int32"),
            (
                lambda s: s.update({"norm.bias": torch.ones(64).to_sparse()}),
                r"norm\.bias is stored as torch\.sparse_coo",
            ),
            (lambda s: s.update({"norm.bias": "text"}), r"norm\.bias is a str, want a tensor"),
            (lambda s: s.update({"backbone.norm.bias": torch.ones(64)}), r"norm\.bias is there twice"),
            (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.0.")], "block 0 is missing"),
            (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.")], "has 0 blocks"),
        ],
    )
    def test_the_weight_is_named(self, tmp_path: Path, change: Any, message: str) -> None:
        state = dict(small_vit().state_dict())
        change(state)
        torch.save(state, tmp_path / "net.pth")
        with pytest.raises(CheckpointError, match=message):
            load_backbone(tmp_path / "net.pth")

    def test_a_number_of_blocks_that_no_resnet_has(self, tmp_path: Path) -> None:
        state = {k: v for k, v in ResNet(ResNetSpec()).state_dict().items() if not k.startswith("layer3.5.")}
        torch.save(state, tmp_path / "net.pth")
        with pytest.raises(CheckpointError, match=r"stages of \[3, 4, 5, 3\] blocks"):
            load_backbone(tmp_path / "net.pth")
