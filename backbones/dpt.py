"""Four layers of a ViT in, one depth map out: the decoder of Ranftl et al. 2021 ("DPT"), in the form DINOv2 put on its features.

Each layer's patches, joined with its CLS, become a map of its own scale (4, 2, 1 and 1/2 times the patch grid); the maps
are then merged from the coarsest to the finest, and three convolutions read the depth.

Axes: B images, N patches (N = h * w, row-major), D feature size, C channels of a map, H W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 4
"""Layers that are read."""


class DptDecoder(nn.Module):
    """Patches and CLS of four layers to raw depth at 16 times the patch grid, [B, 1, 16 h, 16 w]; may be negative."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        sizes = [max(1, width // 2 ** (3 - level)) for level in range(LEVELS)]
        self.reassemble = nn.ModuleList(Reassemble(width, size, level) for level, size in enumerate(sizes))
        self.convs = nn.ModuleList(nn.Conv2d(size, channels, 3, padding=1, bias=False) for size in sizes)
        self.fusions = nn.ModuleList(Fusion(channels, joins=level < LEVELS - 1) for level in range(LEVELS))
        self.project = nn.Conv2d(channels, channels, 3, padding=1)
        self.halve = nn.Conv2d(channels, max(1, channels // 2), 3, padding=1)
        self.narrow = nn.Conv2d(max(1, channels // 2), 32, 3, padding=1)
        self.last = nn.Conv2d(32, 1, 1)

    def forward(self, layers: Sequence[tuple[Tensor, Tensor]], grid: tuple[int, int]) -> Tensor:
        """`layers`: (patches [B, N, D], cls [B, D]), the earliest block first."""
        maps = [
            conv(reassemble(patches_BND, cls_BD, grid))
            for reassemble, conv, (patches_BND, cls_BD) in zip(self.reassemble, self.convs, layers, strict=True)
        ]
        merged = self.fusions[-1](maps[-1], None)
        for level in reversed(range(LEVELS - 1)):
            merged = self.fusions[level](merged, maps[level])
        fine = doubled(self.halve(F.relu(self.project(merged))))
        return self.last(F.relu(self.narrow(fine)))


class Reassemble(nn.Module):
    """Tokens of one layer to a map [B, C, s h, s w], s being 4, 2, 1, 1/2 by `level`; CLS is mixed into every patch ("project")."""

    def __init__(self, width: int, size: int, level: int) -> None:
        super().__init__()
        self.readout = nn.Linear(2 * width, width)
        self.project = nn.Conv2d(width, size, 1)
        resizes = (
            nn.ConvTranspose2d(size, size, 4, stride=4),
            nn.ConvTranspose2d(size, size, 2, stride=2),
            nn.Identity(),
            nn.Conv2d(size, size, 3, stride=2, padding=1),
        )
        self.resize = resizes[level]

    def forward(self, patches_BND: Tensor, cls_BD: Tensor, grid: tuple[int, int]) -> Tensor:
        joined = torch.cat([patches_BND, cls_BD[:, None].expand_as(patches_BND)], dim=-1)
        map_BDhw = F.gelu(self.readout(joined)).transpose(1, 2).unflatten(2, grid)
        return self.resize(self.project(map_BDhw))


class Fusion(nn.Module):
    """The map so far, joined by the next finer one (resized to it where an odd grid left them apart), at twice its size."""

    def __init__(self, channels: int, joins: bool) -> None:
        super().__init__()
        self.of_finer = Residual(channels) if joins else None
        self.of_sum = Residual(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, merged: Tensor, finer: Tensor | None) -> Tensor:
        if self.of_finer is not None and finer is not None:
            finer = F.interpolate(finer, size=merged.shape[2:], mode="bilinear", align_corners=False)
            merged = merged + self.of_finer(finer)
        return self.project(doubled(self.of_sum(merged)))


class Residual(nn.Module):
    """Two convolutions, each after a ReLU, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def doubled(map_BChw: Tensor) -> Tensor:
    """Twice as large, corners on corners."""
    h, w = map_BChw.shape[2:]
    return F.interpolate(map_BChw, size=(2 * h, 2 * w), mode="bilinear", align_corners=True)
