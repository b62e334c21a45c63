"""Heads on a frozen backbone: a linear classifier, and a depth probe.

A head is a .safetensors file whose manifest names the backbone it fits by content hash; loading it onto another backbone is an error.

Axes: B images, N patches (N = h * w, row-major), D feature size, C classes, K depth bins, H W pixels.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.checkpoints import (
    CheckpointError,
    check_content,
    check_manifest,
    load_state_strictly,
    load_tensors,
    save_tensors,
    weights_sha256,
)
from data.errors import InputError

MAX_SIZE = 2**24
"""What no head has; a manifest that says more is damaged or hostile."""


@dataclass(frozen=True)
class LinearHeadSpec:
    """Shape of a linear classifier."""

    n_classes: int
    width_in: int

    def __post_init__(self) -> None:
        _check_sizes(n_classes=self.n_classes, width_in=self.width_in)


class LinearHead(nn.Module):
    """Features [B, D] to logits [B, C]."""

    def __init__(self, spec: LinearHeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.width_in, spec.n_classes)

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.linear(features_BD)


@dataclass(frozen=True)
class DepthHeadSpec:
    """Shape and range of a depth probe."""

    width_in: int
    """Size of its input: patch features followed by CLS, so twice the backbone's."""
    bins: int = 256
    min_depth: float = 0.001
    max_depth: float = 10.0
    unit: str = "metre"

    def __post_init__(self) -> None:
        _check_sizes(width_in=self.width_in, bins=self.bins)
        numbers = all(type(depth) in (int, float) for depth in (self.min_depth, self.max_depth))
        if not numbers or not 0 <= self.min_depth < self.max_depth <= MAX_SIZE or self.bins < 2:
            raise InputError(
                f"depth head has {self.bins} bins from {self.min_depth!r:.40} to {self.max_depth!r:.40}; "
                "want at least 2 bins over a rising, non-negative range"
            )
        if type(self.unit) is not str:
            raise InputError(f"depth head has the unit {self.unit!r:.40}; want its name")


def _check_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise InputError(f"a head's {name} is {value!r:.40}; want a whole number from 1 to {MAX_SIZE}")


class DepthHead(nn.Module):
    """Linear depth probe over uniform bins (Oquab et al. 2023, section 7.4; the "linear-1" head).

    Logits of the bins at each patch are enlarged fourfold, turned into weights by relu(x) + 0.1, and the depth is the weighted mean of
    the bins' centres. The linear layer runs before the enlargement, which is the same and costs a sixteenth.
    """

    ENLARGEMENT = 4
    FLOOR = 0.1

    def __init__(self, spec: DepthHeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.width_in, spec.bins)

    def forward(self, patches_BND: Tensor, cls_BD: Tensor, grid: tuple[int, int], out_hw: tuple[int, int]) -> Tensor:
        """Depth [B, H, W] in `spec.unit`, from patches of an h x w `grid`, enlarged to `out_hw` pixels."""
        h, w = grid
        features = torch.cat([patches_BND, cls_BD[:, None].expand_as(patches_BND)], dim=-1)
        logits_BKhw = self.linear(features).transpose(1, 2).unflatten(2, (h, w))
        logits_BKhw = _enlarge(logits_BKhw, (self.ENLARGEMENT * h, self.ENLARGEMENT * w))
        weights_BKhw = F.relu(logits_BKhw) + self.FLOOR
        bins_K = torch.linspace(self.spec.min_depth, self.spec.max_depth, self.spec.bins, device=features.device)
        depth_Bhw = torch.einsum("bkhw,k->bhw", weights_BKhw, bins_K) / weights_BKhw.sum(dim=1)
        return _enlarge(depth_Bhw[:, None], out_hw)[:, 0]


def _enlarge(map_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(map_BChw, size=size, mode="bilinear", align_corners=False)


HEADS: dict[str, tuple[type, type]] = {"linear": (LinearHead, LinearHeadSpec), "depth": (DepthHead, DepthHeadSpec)}


@dataclass(frozen=True, kw_only=True)
class HeadManifest:
    """What is known of a head; stored with its weights."""

    kind: str
    """A key of `HEADS`."""
    backbone_sha256: str
    """Content hash of the backbone that the head was trained on."""
    spec: dict[str, Any]
    weights_sha256: str = ""
    features: str = ""
    """Which features go in, in words that the evaluator which made the head defines."""
    classes: tuple[str, ...] = ()
    source: str = ""
    data_fingerprint: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "HeadManifest":
        """The inverse of `to_json`; CheckpointError names what is missing or unknown."""
        check_manifest(plain, HEAD_MANIFEST_TYPES, {"kind", "backbone_sha256", "spec"}, "a head")
        return cls(**{**plain, "classes": tuple(str(name) for name in plain.get("classes", ()))})


HEAD_MANIFEST_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "backbone_sha256": (str,),
    "spec": (dict,),
    "weights_sha256": (str,),
    "features": (str,),
    "classes": (list, tuple),
    "source": (str,),
    "data_fingerprint": (str, NoneType),
    "metrics": (dict,),
}
"""What each field of a head's manifest is in JSON."""


def save_head(path: str | Path, head: LinearHead | DepthHead, manifest: HeadManifest) -> HeadManifest:
    """Write a head atomically; kind, spec and content hash are taken from `head`. Returns the manifest as written."""
    state = head.state_dict()
    kind = next(name for name, (network, _) in HEADS.items() if isinstance(head, network))
    manifest = dataclasses.replace(
        manifest, kind=kind, spec=dataclasses.asdict(head.spec), weights_sha256=weights_sha256(state)
    )
    save_tensors(Path(path), state, manifest.to_json())
    return manifest


def load_head(path: str | Path, backbone_sha256: str) -> tuple[LinearHead | DepthHead, HeadManifest]:
    """Read a head for the backbone with this content hash. Raises CheckpointError where it fits another one."""
    state, plain = load_tensors(Path(path))
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(kind, str) or kind not in HEADS:
        found = "has no manifest" if kind is None else f"is a {kind!s:.40}"
        raise CheckpointError(
            f"{path}: {found}, not a head; want one of {', '.join(HEADS)} as the evaluators save them"
        )
    try:
        manifest = HeadManifest.from_json(plain or {})
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if manifest.backbone_sha256 != backbone_sha256:
        raise CheckpointError(
            f"{path}: this head fits the backbone {manifest.backbone_sha256[:12]}, not {backbone_sha256[:12]}; "
            "train it anew on the backbone at hand"
        )
    network, spec = HEADS[manifest.kind]
    try:
        with torch.device("meta"):  # no memory before the shapes are known to fit
            head = network(spec(**manifest.spec))
    except (InputError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the head's spec does not fit its kind ({error}); write the file anew"
        ) from error
    load_state_strictly(head, state, path)
    check_content(state, manifest.weights_sha256, path)
    return head.float().eval(), manifest


def load_depth_head(path: str | Path, backbone_sha256: str) -> tuple[DepthHead, HeadManifest]:
    """Read a depth head; as `load_head`, and raises CheckpointError for a head of another kind."""
    head, manifest = load_head(path, backbone_sha256)
    if not isinstance(head, DepthHead):
        raise CheckpointError(f"{path}: is a {manifest.kind} head; wanted a depth head")
    return head, manifest
