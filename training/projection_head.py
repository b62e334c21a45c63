"""The DINO head: backbone features in, prototype logits out. Used in training only; never served.

Axes: B rows, D features, E bottleneck, K prototypes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from training.prototypes import Scores, Targets, prototype_cross_entropy


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Shape of the projection head (Caron et al. 2021, appendix C)."""

    prototypes: int = 65_536
    """K. Scale it with the data set: more prototypes than images cannot all be used."""
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    batch_norm: bool = False
    bias: bool = True
    """Of the linears before the bottleneck and of it; the prototypes have none."""
    freeze_magnitude: bool = True
    """Keep the norm of each prototype at 1 ("norm_last_layer"); steadier, and slightly worse for large backbones."""

    def __post_init__(self) -> None:
        if min(self.prototypes, self.hidden, self.bottleneck, self.layers) < 1:
            raise InputError(f"the projection head has a size below 1: {self}")


class WeightNormLinear(nn.Module):
    """Bias-free linear whose row k is weight_g[k] * weight_v[k] / |weight_v[k]| (Salimans & Kingma 2016)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(width_out, 1))
        self.weight_v = nn.Parameter(torch.empty(width_out, width_in))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def weight(self) -> Tensor:
        """[K, E]"""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x_BE: Tensor) -> Tensor:
        return F.linear(x_BE, self.weight())


class ProjectionHead(nn.Module):
    """MLP with GELU, L2-normalisation, weight-normalised linear: [B, D] to logits [B, K]."""

    def __init__(self, width_in: int, spec: HeadSpec) -> None:
        super().__init__()
        self.mlp = make_mlp(width_in, spec)
        self.last_layer = WeightNormLinear(spec.bottleneck, spec.prototypes)
        self.last_layer.weight_g.requires_grad_(not spec.freeze_magnitude)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(features_BD))

    def bottleneck(self, features_BD: Tensor) -> Tensor:
        """What the prototypes are compared with, [B, E] of unit length."""
        return F.normalize(self.mlp(features_BD), dim=-1, eps=1e-12)

    def scores(self, features_BD: Tensor) -> Scores:
        """The logits, not multiplied out; no gradient is meant to flow."""
        return Scores(self.bottleneck(features_BD), self.last_layer.weight())

    def cross_entropy(
        self, features_BD: Tensor, targets: Targets, weights_B: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Of the logits of all rows against their targets; see `prototype_cross_entropy`."""
        return prototype_cross_entropy(
            self.bottleneck(features_BD), self.last_layer.weight(), targets, weights_B, temperature
        )


def make_mlp(width_in: int, spec: HeadSpec) -> nn.Module:
    """The MLP before the prototypes; its keys are those of the published heads."""
    if spec.layers == 1:
        return nn.Linear(width_in, spec.bottleneck, bias=spec.bias)
    parts: list[nn.Module] = []
    for i in range(spec.layers - 1):
        parts.append(nn.Linear(width_in if i == 0 else spec.hidden, spec.hidden, bias=spec.bias))
        if spec.batch_norm:
            parts.append(nn.BatchNorm1d(spec.hidden))
        parts.append(nn.GELU())
    return nn.Sequential(*parts, nn.Linear(spec.hidden, spec.bottleneck, bias=spec.bias))
