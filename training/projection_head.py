"""The DINO head: backbone features in, prototype logits out. Used in training only; never served.

Axes: B rows, D features, E bottleneck, K prototypes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        nn.init.kaiming_uniform_(
            self.weight_v, a=math.sqrt(5)
        )  # torch's own for a linear, which the published heads keep here

    def weight(self) -> Tensor:
        """[K, E]"""
        weight_KE: Tensor = _WeightNorm.apply(self.weight_v, self.weight_g)
        return weight_KE

    def forward(self, x_BE: Tensor) -> Tensor:
        return F.linear(x_BE, self.weight())


class _WeightNorm(torch.autograd.Function):
    """`g * v / |v|` by row, some rows at a time, which stay in cache: 65,536 prototypes are 64 MiB, and autograd's formula passes over
    them a dozen times."""

    ROWS = 2048

    @staticmethod
    def forward(ctx: Any, v_KE: Tensor, g_K1: Tensor) -> Tensor:
        norms_K1, weight_KE = v_KE.norm(dim=1, keepdim=True), torch.empty_like(v_KE)
        torch.mul(v_KE, g_K1 / norms_K1, out=weight_KE)
        ctx.save_for_backward(v_KE, g_K1, norms_K1)
        return weight_KE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weight_KE: Tensor) -> tuple[Tensor, Tensor]:
        v_KE, g_K1, norms_K1 = ctx.saved_tensors
        of_v_KE, of_g_K1 = torch.empty_like(v_KE), torch.empty_like(g_K1)
        parts = (one.split(_WeightNorm.ROWS) for one in (v_KE, g_K1, norms_K1, of_weight_KE, of_v_KE, of_g_K1))
        for v_kE, g_k1, norms_k1, of_weight_kE, of_v_kE, of_g_k1 in zip(*parts, strict=True):
            unit_kE = v_kE / norms_k1
            torch.sum(unit_kE * of_weight_kE, dim=1, keepdim=True, out=of_g_k1)
            torch.addcmul(of_weight_kE, unit_kE, of_g_k1, value=-1, out=of_v_kE).mul_(g_k1 / norms_k1)
        return of_v_KE, of_g_K1


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
