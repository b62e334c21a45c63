"""Small networks with strong random weights, and the tolerances of the reference vectors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.checkpoints import Backbone
from backbones.infer import infer_architecture
from backbones.published import backbone_from_state, clean_state
from backbones.vit import ViT, ViTSpec

FORWARD = {"atol": 2e-5, "rtol": 1e-4}
"""What tests/reference/README.md suggests for forward outputs."""


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights so strong that a forgotten bias or a swapped axis shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def small_vit(**fields: Any) -> ViT:
    """A ViT of one head of 64 features, for images of 32 px in patches of 8."""
    model = ViT(ViTSpec(**{"patch_px": 8, "width": 64, "depth": 2, "heads": 1, "img_px": 32, **fields}))
    randomise(model)
    return model.eval()


def given_by(config: dict[str, Any]) -> dict[str, Any]:
    """What a reference network's config.json states and its weights do not."""
    given = {"heads": config["num_heads"]}
    if "interpolate_offset" in config:
        given |= {"pos_offset": config["interpolate_offset"], "pos_antialias": config["interpolate_antialias"]}
    return given


def load_reference(folder: Path, given: dict[str, Any] | None = None) -> tuple[Backbone, dict[str, Tensor]]:
    """The network of a reference folder, and its inputs and outputs."""
    config = json.loads((folder / "config.json").read_text())
    path = folder / "weights.safetensors"
    state = clean_state(load_file(path), path)
    architecture = infer_architecture(state, given_by(config) if given is None else given, path)
    return backbone_from_state(state, architecture, path, source=folder.name), load_file(folder / "io.safetensors")


def sizes_in(io: dict[str, Tensor]) -> list[str]:
    """Image sizes of a reference file, `native` among them."""
    return sorted({name.split("/")[0] for name in io})
