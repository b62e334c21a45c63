"""Our checkpoint: what is written is what is read, and nothing else is accepted."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backbones.checkpoints import (
    MANIFEST_KEY,
    Backbone,
    CheckpointError,
    Manifest,
    build_backbone,
    describe_architecture,
    load_backbone,
    load_tensors,
    make_backbone,
    save_backbone,
    weights_sha256,
)
from backbones.resnet import ResNet, ResNetSpec
from data.preprocess import Preprocess
from tests.backbones.nets import randomise, small_vit

RICH = {"registers": 4, "ffn": "swiglu", "layer_scale": 1e-5, "qkv_bias": False, "mask_token": True, "drop_path": 0.1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A written checkpoint."""
    save_backbone(tmp_path / "net.safetensors", small_vit(**RICH), Manifest(architecture={}))
    return tmp_path / "net.safetensors"


def rewrite(path: Path, change: Any) -> None:
    """Alter the tensors or the manifest of a file as an editor of the file could; `change` gets both."""
    with safe_open(str(path), "pt") as file:
        manifest = json.loads(file.metadata()[MANIFEST_KEY])
    state = load_file(path)
    change(state, manifest)
    save_file(state, path, metadata={MANIFEST_KEY: json.dumps(manifest)})


class TestRoundTrip:
    @pytest.mark.parametrize("fields", [{}, RICH, {"pos_offset": 0.0, "pos_antialias": True, "img_px": 24}])
    def test_a_vit(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        model = small_vit(**fields)
        written = Manifest(
            architecture={},
            preprocess=Preprocess(size_px=96, resize_px=112, whole_px=64, interpolation="bilinear"),
            recipe={"name": "r", "rates": [0.1, 0.2]},
            step=12,
            source="runs/a",
            revision="abc",
            data_fingerprint="def",
            metrics={"knn": {"top1": 0.5}},
        )
        written = save_backbone(tmp_path / "new" / "net.safetensors", model, written)
        found = load_backbone(tmp_path / "new" / "net.safetensors")
        assert found.manifest == written
        assert found.model.spec == model.spec
        assert not found.model.training
        assert {p.requires_grad for p in found.model.parameters()} == {True}
        pixels = torch.randn(2, 3, 40, 32)
        assert torch.equal(found.model(pixels), model(pixels))

    def test_a_resnet(self, tmp_path: Path) -> None:
        model = ResNet(ResNetSpec()).eval()
        randomise(model)
        save_backbone(tmp_path / "net.safetensors", model, Manifest(architecture={}))
        found = load_backbone(tmp_path / "net.safetensors")
        assert found.manifest.architecture == {"family": "resnet", "depth": 50}
        assert weights_sha256(found.model.state_dict()) == weights_sha256(model.state_dict())

    def test_loading_and_saving_again_gives_the_same_bytes(self, path: Path, tmp_path: Path) -> None:
        found = load_backbone(path)
        save_backbone(tmp_path / "again.safetensors", found.model, found.manifest)
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()

    def test_the_manifest_is_readable_without_our_code(self, path: Path) -> None:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert json.loads(header["__metadata__"]["dinoscope"])["architecture"]["registers"] == 4

    @pytest.mark.parametrize("model", [small_vit(**RICH), ResNet(ResNetSpec())], ids=["vit", "resnet"])
    def test_architecture_describes_itself(self, model: Any) -> None:
        architecture = json.loads(json.dumps(describe_architecture(model)))
        assert make_backbone(architecture).spec == model.spec


class TestContentHash:
    def test_it_is_the_hash_of_names_types_shapes_and_bytes(self) -> None:
        state = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor(3)}
        wanted = hashlib.sha256()
        wanted.update(b"a int64 []\n" + np.int64(3).tobytes())
        wanted.update(b"b float32 [1, 2]\n" + np.array([1.5, -2.0], np.float32).tobytes())
        assert weights_sha256(state) == wanted.hexdigest()

    @pytest.mark.parametrize(
        "other",
        [
            {"b": torch.ones(2, 2)},
            {"a": torch.ones(4)},
            {"a": torch.ones(2, 2).double()},
            {"a": torch.tensor([[1.0, 1.0], [1.0, 1.0000001]])},
            {"a": torch.ones(2, 2), "b": torch.ones(0)},
        ],
        ids=["name", "shape", "dtype", "last bit", "one more"],
    )
    def test_any_change_changes_it(self, other: dict[str, torch.Tensor]) -> None:
        assert weights_sha256(other) != weights_sha256({"a": torch.ones(2, 2)})

    def test_neither_order_nor_memory_layout_matters(self) -> None:
        a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
        assert weights_sha256({"a": a, "b": b}) == weights_sha256({"b": b, "a": a.T.contiguous().T})

    def test_an_altered_weight_is_noticed(self, path: Path) -> None:
        rewrite(path, lambda state, _: state["norm.bias"].add_(1e-6))
        with pytest.raises(CheckpointError, match="do not match the content hash"):
            load_backbone(path)


class TestReplacedFiles:
    """What was loaded stays as it was, whatever becomes of the file."""

    def test_weights_do_not_change_when_the_file_is_written_over(self, path: Path) -> None:
        found, pixels = load_backbone(path), torch.randn(1, 3, 32, 32)
        before = found.model(pixels)
        with path.open("r+b") as file:
            file.write(bytes([0x7F]) * path.stat().st_size)
        assert torch.equal(found.model(pixels), before)

    def test_weights_stay_when_the_file_is_cut(self, path: Path) -> None:
        """In a process of its own: a mapped file would end it."""
        program = (
            "import sys, torch; from backbones.checkpoints import load_backbone\n"
            "found = load_backbone(sys.argv[1]); open(sys.argv[1], 'wb').close(); found.model(torch.randn(1, 3, 32, 32))"
        )
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("manifest", ["[]", "3", "[" * 100_000])
def test_a_manifest_that_is_no_object_is_one_line(path: Path, manifest: str) -> None:
    save_file(load_file(path), path, metadata={MANIFEST_KEY: manifest})
    with pytest.raises(CheckpointError, match=r"net\.safetensors: its manifest is"):
        load_backbone(path)


def test_a_name_longer_than_names_may_be_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="give a shorter path"):
        load_backbone("x" * 5000)


class TestStrictness:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s, m: s.pop("norm.weight"), r"net\.safetensors: 1 weights are missing, first norm\.weight"),
            (lambda s, m: s.update(more=torch.ones(1)), "1 weights are unknown, first more"),
            (lambda s, m: s.update(pos_embed=torch.ones(1, 5, 64)), r"pos_embed is \[1, 5, 64\], want \[1, 17, 64\]"),
            (lambda s, m: s.update({"norm.bias": torch.ones(64).int()}), r"norm\.bias is torch\.int32, want torch\.float32"),
            (lambda s, m: m.update(kind="linear"), "holds a linear head, not a backbone"),
            (lambda s, m: m.update(surprise=1), "not a backbone's manifest: it has .*surprise"),
            (lambda s, m: m.pop("preprocess"), "not a backbone's manifest"),
            (lambda s, m: m["preprocess"].pop("mean"), "lacks mean"),
            (lambda s, m: m["architecture"].update(family="cnn"), "family 'cnn' is unknown; want one of vit, resnet"),
            (lambda s, m: m["architecture"].update(wings=2), r"unknown fields \['wings'\]"),
            (lambda s, m: m["architecture"].pop("width"), "family vit is incomplete or mistyped"),
            (lambda s, m: m["architecture"].update(width="64"), r"net\.safetensors: ViT width is '64'; want a whole number"),
            (lambda s, m: m["architecture"].update(width=10**12), "ViT width is 1000000000000; want a whole number"),
            (lambda s, m: m["architecture"].update(depth=10**9), "ViT depth is 1000000000; want a whole number"),
            (lambda s, m: m["architecture"].update(registers=-1), "ViT registers is -1; want a whole number, at least 0"),
            (lambda s, m: m["architecture"].update(pos_offset="a"), "ViT pos_offset is 'a'; want a number"),
            (lambda s, m: m["architecture"].update(ffn="cnn"), "ViT ffn is 'cnn'; want one of mlp, swiglu"),
            (lambda s, m: m["architecture"].update(family=["vit"]), r"family \['vit'\] is unknown"),
            (lambda s, m: m["architecture"].update(pos_offset=10**400), "ViT pos_offset is 1000.*; want a number"),
            (lambda s, m: m["architecture"].update(mask_token="no"), "ViT mask_token is 'no'; want true or false"),
            (lambda s, m: m["architecture"].update(patch_px=65536, img_px=65536, width=65536, in_channels=65536), "mistyped"),
            (lambda s, m: m.update(architecture="vit"), r"net\.safetensors: architecture in the manifest is a str, want dict"),
            (lambda s, m: m.update(architecture=None), r"net\.safetensors: architecture in the manifest is a NoneType"),
            (lambda s, m: m.update(preprocess=None), r"net\.safetensors: preprocess in the manifest is a NoneType"),
            (lambda s, m: m.update(step="1"), "step in the manifest is a str, want int or NoneType"),
            (lambda s, m: m.update(metrics=[1]), "metrics in the manifest is a list, want dict"),
            (lambda s, m: m["preprocess"].update(size_px=0), r"net\.safetensors: .*size_px is 0"),
            (lambda s, m: m["architecture"].update(heads=7), r"net\.safetensors: ViT width 64 does not divide into 7 heads"),
            (lambda s, m: m["architecture"].update(depth=3), r"missing, first blocks\.2\."),
            # Shapes are compared before memory is taken: this network would need terabytes.
            (lambda s, m: m["architecture"].update(width=64_000), "of another shape, first "),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_named(self, path: Path, change: Any, message: str) -> None:
        rewrite(path, change)
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(path)
        assert "\n" not in str(caught.value)

    def test_a_file_without_manifest_is_not_ours(self, tmp_path: Path) -> None:
        save_file(small_vit().state_dict(), tmp_path / "net.safetensors")
        with pytest.raises(CheckpointError, match="has no manifest"):
            load_backbone(tmp_path / "net.safetensors")

    def test_a_manifest_that_is_not_json(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "net.safetensors", metadata={MANIFEST_KEY: "{"})
        with pytest.raises(CheckpointError, match="manifest is not JSON"):
            load_backbone(tmp_path / "net.safetensors")

    @pytest.mark.parametrize("size", [0, 4, 100, 1000, 100_000])
    def test_a_file_cut_short(self, path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="was it cut short") as caught:
            load_tensors(path)
        assert "\n" not in str(caught.value)

    def test_the_network_keeps_its_own_weights_when_the_file_does_not_fit(self) -> None:
        state = small_vit().state_dict()
        with pytest.raises(CheckpointError, match="in memory: 1 weights are unknown, first more"):
            build_backbone(describe_architecture(small_vit()), {**state, "more": torch.ones(1)}, "in memory")


WRITER = """
import sys
import {module} as interrupted
from backbones.checkpoints import Manifest, load_backbone, save_backbone

found = load_backbone(sys.argv[1])
found.model.norm.bias.data += 1

def wait(*arguments):
    print("there", flush=True)
    sys.stdin.read()

interrupted.{function} = wait
save_backbone(sys.argv[1], found.model, found.manifest)
"""


class TestAtomicWrites:
    @pytest.mark.parametrize("function", ["fsync", "chmod", "replace"])
    def test_a_process_killed_while_writing_leaves_the_old_file(
        self, path: Path, repo_root: Path, function: str
    ) -> None:
        before = path.read_bytes()
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER.format(module="os", function=function), str(path)],
            cwd=repo_root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"there\n"
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        assert path.read_bytes() == before
        assert isinstance(load_backbone(path), Backbone)

    def test_a_failed_write_leaves_nothing_behind(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, found = path.read_bytes(), load_backbone(path)

        def full_disk(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_backbone(path, found.model, dataclasses.replace(found.manifest, step=7))
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == before

    def test_others_may_read_the_file(self, path: Path) -> None:
        assert path.stat().st_mode & 0o777 == 0o644
