"""Small networks of every kind, saved and exported once for all tests that want them."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from backbones.checkpoints import Manifest, save_backbone
from backbones.heads import DepthHead, DepthHeadSpec, HeadManifest, save_head
from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import ViT, ViTSpec
from data.preprocess import Preprocess
from exports.to_onnx import Parity, export_onnx

# The grids of the position tables (3 and 2) are the sizes of the exporter's own example, so that an axis which was
# frozen to its example would be noticed.
V1 = ViTSpec(patch_px=8, width=32, depth=2, heads=2, img_px=24)
V2 = ViTSpec(
    patch_px=7,
    width=32,
    depth=2,
    heads=4,
    img_px=14,
    registers=4,
    ffn="swiglu",
    layer_scale=0.5,
    pos_offset=0.0,
    pos_antialias=True,
    mask_token=True,
)
SIZES = {
    "v1": Preprocess(size_px=24, resize_px=28, whole_px=40),
    "v2": Preprocess(size_px=28, resize_px=32, whole_px=21),
    "resnet": Preprocess(size_px=64, resize_px=72, whole_px=96),
}
NAMES = tuple(SIZES)


@dataclass(frozen=True)
class Artifact:
    """A checkpoint, its depth head where it has one, and both as one .onnx."""

    ckpt: Path
    depth_head: Path | None
    onnx: Path
    parity: Parity
    outputs: tuple[str, ...]
    step_px: int


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="artifacts-")


def save_network(name: str, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A backbone with lively random weights, and a depth head that fits it."""
    torch.manual_seed(seed)
    model = ResNet(ResNetSpec(depth=50)) if name == "resnet" else ViT({"v1": V1, "v2": V2}[name])
    with torch.no_grad():
        for key, weight in model.state_dict().items():
            if name != "resnet" and weight.dim() > 1:
                weight.normal_(std=0.2)
            elif key.endswith(("running_mean", "bias")):
                weight.normal_(std=0.1)
            elif key.endswith("running_var"):
                weight.uniform_(0.5, 2.0)
    folder.mkdir(parents=True, exist_ok=True)
    ckpt, head_path = folder / f"{name}.safetensors", folder / f"{name}-depth.safetensors"
    manifest = save_backbone(ckpt, model, Manifest(architecture={}, preprocess=SIZES[name], source="random", step=7))
    head = DepthHead(DepthHeadSpec(width_in=2 * model.embed_dim, bins=16, unit="furlong"))
    save_head(head_path, head, HeadManifest(kind="depth", backbone_sha256=manifest.weights_sha256, spec={}))
    return ckpt, head_path


@functools.cache
def artifact(name: str) -> Artifact:
    """The artifact of `v1` (with depth), `v2` (without) or `resnet` (with depth); an export takes seconds."""
    folder = Path(_folder().name)
    ckpt, head = save_network(name, folder)
    depth_head = None if name == "v2" else head
    onnx = folder / f"{name}.onnx"
    parity = export_onnx(ckpt, onnx, depth_head).parity
    attention = () if name == "resnet" else ("attention",)
    outputs = ("embedding", "patches", *attention, *(("depth",) if depth_head else ()))
    return Artifact(ckpt, depth_head, onnx, parity, outputs, {"v1": 8, "v2": 7, "resnet": 32}[name])
