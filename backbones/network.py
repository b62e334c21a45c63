"""A backbone with its heads as one network: what is served and what is exported."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones.checkpoints import Backbone
from backbones.heads import (
    AnyDepthHead,
    HeadManifest,
    LinearHead,
    SegmentationHead,
    load_depth_head,
    load_linear_head,
    load_segmentation_head,
)
from backbones.resnet import ResNet
from backbones.vit import ViT
from data.errors import InputError


class LinearFeatures(NamedTuple):
    """What a linear head reads, all of it after the final norm."""

    blocks: int
    """CLS of so many of the last blocks, oldest first."""
    patch_mean: bool
    """Behind them the mean patch of the last block."""
    alternating: bool = False
    """CLS and mean patch in turn, feature by feature."""


LINEAR_FEATURES = {
    "cls": LinearFeatures(1, False),
    "cls+patch_mean": LinearFeatures(1, True),
    "cls_last4": LinearFeatures(4, False),
    "cls_last4+patch_mean": LinearFeatures(4, True),
    "cls*patch_mean": LinearFeatures(1, True, alternating=True),
}
"""By the name in a linear head's manifest, see `evaluators.combinations`."""


class Network(nn.Module):
    """Normalised pixels [B, 3, H, W] to every output that the backbone and its heads have."""

    def __init__(
        self,
        backbone: ViT | ResNet,
        depth_head: AnyDepthHead | None = None,
        segmentation_head: SegmentationHead | None = None,
        linear_head: LinearHead | None = None,
        linear_features: str = "cls",
    ) -> None:
        """`linear_features` are those of the linear head's manifest, see `LINEAR_FEATURES`. Raises InputError."""
        super().__init__()
        if linear_head is not None:
            check_linear_fits(linear_head, linear_features, backbone)
        for name, head, parts in (("depth", depth_head, 2), ("segmentation", segmentation_head, 1)):
            if head is not None:
                check_fits(name, head, backbone, parts)
        self.backbone = backbone
        self.depth_head = depth_head
        self.segmentation_head = segmentation_head
        self.linear_head = linear_head
        self.linear_features = linear_features

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order in which `forward` gives them."""
        attention = ("attention",) if isinstance(self.backbone, ViT) else ()
        depth = ("depth",) if self.depth_head is not None else ()
        classes = ("classes",) if self.segmentation_head is not None else ()
        logits = ("logits",) if self.linear_head is not None else ()
        return ("embedding", "patches", *attention, *logits, *depth, *classes)

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """`embedding` [B, D], `patches` [B, N, D], `attention` [B, heads, h, w] (ViT), and with their heads `logits` [B, C],
        `depth` [B, H, W] and `classes` int32 [B, H, W]."""
        H, W = pixels_BCHW.shape[2:]
        grid = (H // self.backbone.patch_px, W // self.backbone.patch_px)
        layers = self.layers_read
        made = self.backbone.outputs(pixels_BCHW, layers) if layers else self.backbone.outputs(pixels_BCHW)  # type: ignore[call-arg]
        outputs = {name: made[name] for name in self.output_names if name in made}
        if self.linear_head is not None:
            outputs["logits"] = self.linear_head(self._linear_input(made))
        if self.depth_head is not None:
            patches_BND, cls_BD = self.read_layers(made, self.depth_head.spec.layers, norm=False)
            outputs["depth"] = self.depth_head(patches_BND, cls_BD, grid, (H, W))
        if self.segmentation_head is not None:
            patches_BND, _ = self.read_layers(made, self.segmentation_head.spec.layers, norm=True)
            outputs["classes"] = self.segmentation_head(patches_BND, grid, (H, W))
        return outputs

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Blocks whose CLS the linear head reads; empty where the last one's, after the norm, is all."""
        wanted = LINEAR_FEATURES[self.linear_features].blocks if self.linear_head is not None else 1
        depth = self.backbone.spec.depth
        return tuple(range(depth - wanted, depth)) if wanted > 1 else ()

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Blocks whose tokens the heads read, each once."""
        read = {n for head in (self.depth_head, self.segmentation_head) if head for n in head.spec.layers}
        return tuple(sorted(read.union(self.linear_layers)))

    def _linear_input(self, made: dict[str, Tensor]) -> Tensor:
        cls_BD = made["embedding"]
        if self.linear_layers:
            assert isinstance(self.backbone, ViT)
            cls_BD = torch.cat([self.backbone.norm(made[f"block{n}"][:, 0]) for n in self.linear_layers], dim=1)
        _, patch_mean, alternating = LINEAR_FEATURES[self.linear_features]
        parts = [cls_BD, made["patches"].mean(dim=1)] if patch_mean else [cls_BD]
        return torch.stack(parts, dim=2).flatten(1) if alternating else torch.cat(parts, dim=1)

    def read_layers(self, made: dict[str, Tensor], layers: tuple[int, ...], norm: bool) -> tuple[Tensor, Tensor]:
        """Patches [B, N, L D] and CLS [B, L D] of the layers that a head reads, one after another."""
        if not layers:
            return made["patches"], made["embedding"]
        assert isinstance(self.backbone, ViT)
        tokens = [made[f"block{n}"] for n in layers]
        joined_BTD = torch.cat([self.backbone.norm(x_BTD) if norm else x_BTD for x_BTD in tokens], dim=2)
        return joined_BTD[:, 1 + self.backbone.spec.registers :], joined_BTD[:, 0]


def check_fits(name: str, head: AnyDepthHead | SegmentationHead, backbone: ViT | ResNet, parts: int) -> None:
    """Raise InputError where the head wants other features than the backbone has."""
    layers = head.spec.layers
    depth = backbone.spec.depth if isinstance(backbone, ViT) else 0
    if layers and layers[-1] >= depth:
        has = f"has blocks 0 to {depth - 1}" if depth else "has no blocks"
        raise InputError(f"the {name} head reads blocks {list(layers)}, this backbone {has}; train a head on it")
    given = parts * backbone.embed_dim * max(1, len(layers))
    if head.spec.width_in != given:
        what = "patch and CLS" if parts == 2 else "patches"
        raise InputError(
            f"the {name} head takes {head.spec.width_in} features, this backbone gives {given} ({what}); "
            "train a head on this backbone"
        )


def check_linear_fits(head: LinearHead, features: str, backbone: ViT | ResNet) -> None:
    """Raise InputError where a linear head reads what the backbone does not give."""
    if features not in LINEAR_FEATURES:
        raise InputError(
            f"the linear head reads the features {features!r:.60}; a network gives {', '.join(LINEAR_FEATURES)}"
        )
    blocks, patch_mean, _ = LINEAR_FEATURES[features]
    depth = backbone.spec.depth if isinstance(backbone, ViT) else 1
    if blocks > depth:
        has = f"has {depth} blocks" if isinstance(backbone, ViT) else "is a ResNet"
        raise InputError(f"the linear head reads {features}, this backbone {has}; train a head on it")
    given = (blocks + patch_mean) * backbone.embed_dim
    if head.spec.width_in != given:
        raise InputError(
            f"the linear head takes {head.spec.width_in} features, this backbone gives {given} ({features}); "
            "train a head on this backbone"
        )


@dataclass(frozen=True)
class Heads:
    """Heads of one backbone, each with its manifest."""

    linear: tuple[LinearHead, HeadManifest] | None = None
    depth: tuple[AnyDepthHead, HeadManifest] | None = None
    segmentation: tuple[SegmentationHead, HeadManifest] | None = None

    @property
    def manifests(self) -> dict[str, HeadManifest]:
        """Kind to manifest of the heads that are there."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {kind: pair[1] for kind, pair in pairs if pair is not None}


def load_heads(
    backbone: Backbone,
    linear: str | Path | None = None,
    depth: str | Path | None = None,
    segmentation: str | Path | None = None,
) -> Heads:
    """Read the heads that are named. Raises CheckpointError for one of another backbone or kind."""
    fits = backbone.manifest.weights_sha256
    return Heads(
        None if linear is None else load_linear_head(linear, fits),
        None if depth is None else load_depth_head(depth, fits),
        None if segmentation is None else load_segmentation_head(segmentation, fits),
    )


def make_network(backbone: Backbone, heads: Heads) -> Network:
    """Backbone and heads as one network. Raises InputError where a head does not fit."""
    linear, features = (heads.linear[0], heads.linear[1].features) if heads.linear else (None, "")
    return Network(
        backbone.model,  # type: ignore[arg-type]
        heads.depth[0] if heads.depth else None,
        heads.segmentation[0] if heads.segmentation else None,
        linear,
        features,
    ).eval()
