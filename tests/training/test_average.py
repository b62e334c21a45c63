"""Averages of weights of networks that began as one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.checkpoints import Backbone, Manifest, load_backbone, save_backbone
from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import ViT, ViTSpec
from data.errors import InputError
from data.preprocess import Preprocess
from training.average import average, main
from training.warm_start import fit_

SPEC = ViTSpec(patch_px=8, width=24, depth=1, heads=2, img_px=32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b of one architecture; b learned a mask token, dropped had stochastic depth, larger crops of twice the size; wide and other
    differ from them."""
    folder = tmp_path_factory.mktemp("average")
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "a": (ViT(SPEC), {}),
        "b": (ViT(replace(SPEC, mask_token=True)), {"step": 7, "recipe": {"name": "smoke"}}),
        "dropped": (ViT(replace(SPEC, drop_path=0.3, drop_path_uniform=True)), {}),
        "wide": (ViT(replace(SPEC, width=48)), {}),
        "larger": (ViT(replace(SPEC, img_px=64)), {"preprocess": Preprocess(size_px=64)}),
        "other": (ViT(SPEC), {"preprocess": Preprocess(mean=(0.5, 0.5, 0.5))}),
        "resnet": (ResNet(ResNetSpec()), {}),
    }
    for name, (model, more) in made.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
        save_backbone(folder / f"{name}.safetensors", model, Manifest(architecture={}, **more))
    return folder


def opened(folder: Path, *names: str) -> list[Backbone]:
    return [load_backbone(folder / f"{name}.safetensors") for name in names]


def test_each_weight_is_the_mean_and_a_mask_token_that_of_those_that_have_one(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    main([str(saved / "a.safetensors"), str(saved / "b.safetensors")], out, [0.25, 0.75])
    (a, b), c = opened(saved, "a", "b"), load_backbone(out)
    for name, value in c.model.state_dict().items():
        wanted = b.model.state_dict()[name]
        if name != "mask_token":
            wanted = 0.25 * a.model.state_dict()[name] + 0.75 * wanted
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-6)
    assert c.manifest.architecture["mask_token"] is True
    assert (c.manifest.step, c.manifest.recipe) == (7, {"name": "smoke"}), "those of the last"
    for part in ("0.25", "0.75", a.manifest.weights_sha256[:12], b.manifest.weights_sha256[:12]):
        assert part in c.manifest.source


def test_the_order_of_equal_shares_does_not_matter(saved: Path) -> None:
    forth, back = (average(opened(saved, *names), [0.5, 0.5]) for names in ("ab", "ba"))
    for name, value in forth.items():
        assert torch.equal(value, back[name]), name


def test_phases_with_other_stochastic_depth_are_copies_of_one_network(saved: Path) -> None:
    """As DINOv1 at 0.1 and the DINOv2 phase that went on from it at 0.3; a student of a teacher has none."""
    a, dropped = opened(saved, "a", "dropped")
    mean = average([a, dropped], [0.5, 0.5])["blocks.0.mlp.fc1.weight"]
    parts = [one.model.state_dict()["blocks.0.mlp.fc1.weight"] for one in (a, dropped)]
    torch.testing.assert_close(mean, sum(parts) / 2)


def test_a_phase_at_high_resolution_is_a_copy_whose_positions_are_resized(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    main([str(saved / "a.safetensors"), str(saved / "larger.safetensors")], out, [0.25, 0.75])
    a, larger = opened(saved, "a", "larger")
    c = load_backbone(out)
    assert (c.manifest.architecture["img_px"], c.manifest.preprocess.size_px) == (64, 64), "those of the last"
    began = ViT(replace(SPEC, img_px=64))
    fit_(began, a.model.state_dict(), "a")
    for name, value in c.model.state_dict().items():
        wanted = 0.25 * began.state_dict()[name] + 0.75 * larger.model.state_dict()[name]
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-6)


def test_an_average_is_not_written_over_what_it_is_of(saved: Path) -> None:
    before = (saved / "a.safetensors").read_bytes()
    with pytest.raises(InputError, match="is one of the networks that are averaged"):
        main([str(saved / "a.safetensors"), str(saved / "b.safetensors")], saved / "." / "a.safetensors")
    assert (saved / "a.safetensors").read_bytes() == before


def test_an_average_that_cannot_be_written_is_told_in_one_line(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot be written .*; choose another place"):
        main([str(saved / "a.safetensors"), str(saved / "b.safetensors")], tmp_path / "file" / "c.safetensors")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        (["a"], [1.0], "1 backbone; an average needs at least 2"),
        (["a", "b"], [1.0], "1 came for 2 backbones"),
        (["a", "b"], [0.5, 0.6], "want numbers above 0 that sum to 1"),
        (["a", "b"], [-0.5, 1.5], "want numbers above 0 that sum to 1"),
        (["a", "b"], [float("nan"), 1.0], "want numbers above 0 that sum to 1"),
        (["a", "wide"], [0.5, 0.5], "architectures differ in width"),
        (["a", "resnet"], [0.5, 0.5], "architectures differ in .*family"),
        (["a", "other"], [0.5, 0.5], "preprocessing differs"),
    ],
)
def test_what_has_no_mean_is_refused(saved: Path, names: list[str], weights: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        average(opened(saved, *names), weights)


def test_the_command_says_what_it_wrote_and_refuses_in_one_line(saved: Path, tmp_path: Path, repo_root: Path) -> None:
    a, b, out = (str(saved / "a.safetensors"), str(saved / "b.safetensors"), str(tmp_path / "c.safetensors"))
    words = [sys.executable, "-m", "training.average", "--ckpt", a, b, "--out", out]
    done = subprocess.run(words, cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{out}: average of weights: 0.5 {a} (")
    refused = subprocess.run([*words, "--weights", "2", "3"], cwd=repo_root, capture_output=True, text=True)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
