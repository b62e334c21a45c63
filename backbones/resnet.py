"""ResNet-50: pixels in, features out. Key names are torchvision's, which the published DINO weights use.

Axes: B images, N cells of the last map (N = h * w, row-major), D = 2048 features.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from data.errors import InputError

STAGES: dict[int, tuple[int, int, int, int]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Bottleneck blocks of each stage by depth (He et al. 2016, table 1)."""
EXPANSION = 4


@dataclass(frozen=True, kw_only=True)
class ResNetSpec:
    """The architecture of a ResNet; stored in every checkpoint."""

    depth: int = 50

    def __post_init__(self) -> None:
        if type(self.depth) is not int or self.depth not in STAGES:
            raise InputError(f"ResNet depth is {self.depth!r:.40}; want one of {', '.join(map(str, STAGES))}")


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as in torchvision), 1x1 convolutions around a shortcut."""

    def __init__(self, n_in: int, n_mid: int, stride: int) -> None:
        super().__init__()
        n_out = EXPANSION * n_mid
        self.conv1 = nn.Conv2d(n_in, n_mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_mid)
        self.conv2 = nn.Conv2d(n_mid, n_mid, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_mid)
        self.conv3 = nn.Conv2d(n_mid, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out))
            if stride != 1 or n_in != n_out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """A bottleneck ResNet without classifier (He et al. 2016)."""

    patch_px = 32
    """Pixels of the image a cell of the last map stands for."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        n_in = 64
        for i, n_blocks in enumerate(STAGES[spec.depth]):
            n_mid = 64 * 2**i
            blocks = []
            for j in range(n_blocks):
                blocks.append(Bottleneck(n_in, n_mid, stride=2 if i and not j else 1))
                n_in = EXPANSION * n_mid
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.reset_parameters()

    @property
    def embed_dim(self) -> int:
        """Size D of an embedding."""
        return EXPANSION * 512

    def reset_parameters(self) -> None:
        """He initialisation of convolutions; norms start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def last_map(self, pixels_BCHW: Tensor) -> Tensor:
        """The last feature map, [B, D, h, w], each cell 32 pixels wide."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixels_BCHW))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
        return x

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Embedding [B, D]: the mean over the last map."""
        return self.last_map(pixels_BCHW).mean(dim=(2, 3))

    def outputs(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Served outputs: `embedding` [B, D] and `patches` [B, N, D]. A ResNet has no attention."""
        map_BDhw = self.last_map(pixels_BCHW)
        return {"embedding": map_BDhw.mean(dim=(2, 3)), "patches": map_BDhw.flatten(2).transpose(1, 2)}
