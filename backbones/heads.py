"""Heads on a frozen backbone: a linear classifier, depth (linear or DPT), and linear segmentation.

Dense heads take patch features and CLS of the layers in their spec, concatenated along the channels, so a head on four
layers is called like one on the last.

A head is a .safetensors file whose manifest names the backbone it fits by content hash; loading it onto another backbone is an error.

Axes: B images, N patches (N = h * w, row-major), D feature size, C classes, K depth bins, H W pixels.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args

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
from backbones.dpt import LEVELS, DptDecoder
from data.errors import InputError

MAX_SIZE = 2**24
"""What no head has; a manifest that says more is damaged or hostile."""
MAX_LAYERS = 1024


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


DepthDecoder = Literal["linear", "dpt"]


@dataclass(frozen=True)
class DepthHeadSpec:
    """Shape and range of a depth head."""

    width_in: int
    """Size of its input: patch features followed by CLS, so twice the backbone's for each layer that it reads."""
    bins: int = 256
    """Of the linear decoder."""
    min_depth: float = 0.001
    max_depth: float = 10.0
    unit: str = "metre"
    layers: tuple[int, ...] = ()
    """Blocks that it reads, numbered from 0, before the final norm; empty: the last one's `patches` and `embedding`, after it."""
    decoder: DepthDecoder = "linear"
    channels: int = 256
    """Of the DPT decoder's maps."""

    def __post_init__(self) -> None:
        _check_sizes(width_in=self.width_in, bins=self.bins, channels=self.channels)
        object.__setattr__(self, "layers", _check_layers(self.layers, self.width_in, 2))
        numbers = all(type(depth) in (int, float) for depth in (self.min_depth, self.max_depth))
        if not numbers or not 0 <= self.min_depth < self.max_depth <= MAX_SIZE or self.bins < 2:
            raise InputError(
                f"depth head has {self.bins} bins from {self.min_depth!r:.40} to {self.max_depth!r:.40}; "
                "want at least 2 bins over a rising, non-negative range"
            )
        if type(self.unit) is not str:
            raise InputError(f"depth head has the unit {self.unit!r:.40}; want its name")
        if self.decoder not in get_args(DepthDecoder):
            raise InputError(f"depth head has the decoder {self.decoder!r:.40}; want linear or dpt")
        if self.decoder == "dpt" and len(self.layers) != LEVELS:
            raise InputError(f"a DPT depth head reads {LEVELS} layers; {list(self.layers)} were named")


@dataclass(frozen=True)
class SegmentationHeadSpec:
    """Shape of a linear segmentation head."""

    n_classes: int
    width_in: int
    """Size of its input: the backbone's for each layer that it reads."""
    layers: tuple[int, ...] = ()
    """Blocks that it reads, numbered from 0, each after the final norm; empty: the last one's `patches`."""

    def __post_init__(self) -> None:
        _check_sizes(n_classes=self.n_classes, width_in=self.width_in)
        object.__setattr__(self, "layers", _check_layers(self.layers, self.width_in, 1))


def _check_layers(layers: object, width_in: int, parts: int) -> tuple[int, ...]:
    good = isinstance(layers, list | tuple) and all(type(n) is int and 0 <= n < MAX_LAYERS for n in layers)
    if not good or list(layers) != sorted(set(layers)):  # type: ignore[call-overload]
        raise InputError(f"a head's layers are {layers!r:.40}; want numbers of blocks, rising, each below {MAX_LAYERS}")
    found: tuple[int, ...] = tuple(layers)  # type: ignore[arg-type]
    if width_in % (parts * max(1, len(found))):
        raise InputError(
            f"a head's width_in is {width_in}; it does not divide into {parts} x {max(1, len(found))} parts"
        )
    return found


def _check_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise InputError(f"a head's {name} is {value!r:.40}; want a whole number from 1 to {MAX_SIZE}")


class DepthHead(nn.Module):
    """Linear depth probe over uniform bins (Oquab et al. 2023, section 7.4; "linear-1", and "linear-4" on four layers).

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


class DptDepthHead(nn.Module):
    """Depth by the DPT decoder on four layers (Oquab et al. 2023, section 7.4): its output, at least 0, plus the nearest depth."""

    def __init__(self, spec: DepthHeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.decoder = DptDecoder(spec.width_in // (2 * LEVELS), spec.channels)

    def forward(self, patches_BND: Tensor, cls_BD: Tensor, grid: tuple[int, int], out_hw: tuple[int, int]) -> Tensor:
        """As `DepthHead.forward`; the features are those of the four layers, one after another."""
        layers = list(zip(patches_BND.chunk(LEVELS, dim=2), cls_BD.chunk(LEVELS, dim=1), strict=True))
        depth_B1hw = F.relu(self.decoder(layers, grid)) + self.spec.min_depth
        return _enlarge(depth_B1hw, out_hw)[:, 0].clamp(max=self.spec.max_depth)


def make_depth_head(spec: DepthHeadSpec) -> DepthHead | DptDepthHead:
    """The head that the spec names."""
    return DptDepthHead(spec) if spec.decoder == "dpt" else DepthHead(spec)


class SegmentationHead(nn.Module):
    """A linear layer on each patch (Oquab et al. 2023, section 7.4); the batch norm it is trained behind is folded into it."""

    def __init__(self, spec: SegmentationHeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.width_in, spec.n_classes)

    def logits(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits of each patch, [B, C, h, w]."""
        return self.linear(patches_BND).transpose(1, 2).unflatten(2, grid)

    def forward(self, patches_BND: Tensor, grid: tuple[int, int], out_hw: tuple[int, int]) -> Tensor:
        """Index of the class of each pixel, int32 [B, H, W]: logits are enlarged bilinearly, then compared."""
        return _enlarge(self.logits(patches_BND, grid), out_hw).argmax(dim=1).to(torch.int32)


def _enlarge(map_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(map_BChw, size=size, mode="bilinear", align_corners=False)


AnyDepthHead = DepthHead | DptDepthHead
Head = LinearHead | DepthHead | DptDepthHead | SegmentationHead
HEADS: dict[str, tuple[Callable[[Any], Head], type]] = {
    "linear": (LinearHead, LinearHeadSpec),
    "depth": (make_depth_head, DepthHeadSpec),
    "segmentation": (SegmentationHead, SegmentationHeadSpec),
}
"""Kind to what makes the head from its spec, and the spec's class, which tells the kinds apart."""


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


def save_head(path: str | Path, head: Head, manifest: HeadManifest) -> HeadManifest:
    """Write a head atomically; kind, spec and content hash are taken from `head`. Returns the manifest as written.

    Raises InputError where it cannot be written.
    """
    state = head.state_dict()
    kind = next(name for name, (_, spec_type) in HEADS.items() if isinstance(head.spec, spec_type))
    spec = json.loads(json.dumps(dataclasses.asdict(head.spec)))  # as it will be read
    manifest = dataclasses.replace(manifest, kind=kind, spec=spec, weights_sha256=weights_sha256(state))
    try:
        save_tensors(Path(path), state, manifest.to_json())
    except OSError as error:
        raise InputError(f"{path}: the head cannot be written there ({error.strerror}); name another place") from error
    return manifest


def load_head(path: str | Path, backbone_sha256: str) -> tuple[Head, HeadManifest]:
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
    make, spec = HEADS[manifest.kind]
    try:
        with torch.device("meta"):  # no memory before the shapes are known to fit
            head = make(spec(**manifest.spec))
    except (InputError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the head's spec does not fit its kind ({error}); write the file anew"
        ) from error
    load_state_strictly(head, state, path)
    check_content(state, manifest.weights_sha256, path)
    return head.float().eval(), manifest


def load_depth_head(path: str | Path, backbone_sha256: str) -> tuple[AnyDepthHead, HeadManifest]:
    """Read a depth head; as `load_head`, and raises CheckpointError for a head of another kind."""
    head, manifest = load_head(path, backbone_sha256)
    if not isinstance(head, AnyDepthHead):
        raise CheckpointError(f"{path}: is a {manifest.kind} head; wanted a depth head")
    return head, manifest


def load_segmentation_head(path: str | Path, backbone_sha256: str) -> tuple[SegmentationHead, HeadManifest]:
    """Read a segmentation head, whose manifest names a class for each index; errors as in `load_depth_head`."""
    return _load_classifier(path, backbone_sha256, SegmentationHead, "segmentation")


def load_linear_head(path: str | Path, backbone_sha256: str) -> tuple[LinearHead, HeadManifest]:
    """Read a linear classifier, whose manifest names a class for each index; errors as in `load_depth_head`."""
    return _load_classifier(path, backbone_sha256, LinearHead, "linear")


C = TypeVar("C", LinearHead, SegmentationHead)


def _load_classifier(path: str | Path, backbone_sha256: str, kind: type[C], name: str) -> tuple[C, HeadManifest]:
    head, manifest = load_head(path, backbone_sha256)
    if not isinstance(head, kind):
        raise CheckpointError(f"{path}: is a {manifest.kind} head; wanted a {name} head")
    if len(manifest.classes) != head.spec.n_classes:
        raise CheckpointError(
            f"{path}: names {len(manifest.classes)} classes and tells {head.spec.n_classes} apart; train it anew"
        )
    return head, manifest
