"""Many linear classifiers on the same features, trained as one: features and labels in, one head per learning rate out.

The heads share every batch, so their logits are one product X W with the heads side by side, and the gradient of
softmax cross-entropy is known in closed form: two products a step, whatever the number of heads, and no autograd.
Each head's columns see its own gradient only: the result is that of as many separate `nn.Linear` under SGD.
Legend: n images, B batch, D feature size, H heads, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM = 0.9
INITIAL_STD = 0.01
"""Weights start from N(0, 0.01), biases from 0 (DINO, DINOv2)."""


@dataclass(frozen=True)
class Heads:
    """Trained classifiers, one per learning rate."""

    weight_DHC: Tensor
    bias_HC: Tensor

    def logits(self, features_nD: Tensor) -> Tensor:
        """Logits [n, H, C]; a head that diverged says the same about every class."""
        n_heads, n_classes = self.bias_HC.shape
        flat = features_nD @ self.weight_DHC.reshape(len(self.weight_DHC), -1)
        logits_nHC = flat.reshape(-1, n_heads, n_classes) + self.bias_HC
        return torch.where(self.finite_H[None, :, None], logits_nHC, 0.0)

    @property
    def finite_H(self) -> Tensor:
        """False for heads whose learning rate was too high for the features."""
        return self.weight_DHC.isfinite().all(dim=2).all(dim=0) & self.bias_HC.isfinite().all(dim=1)


def train_heads(
    features_nD: Tensor,
    labels_n: Tensor,
    n_classes: int,
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Heads:
    """Train one head per learning rate: SGD, momentum 0.9, no decay, cosine to 0 per step, mean cross-entropy.

    Batches are cut from a fresh permutation each epoch; an incomplete last batch is dropped, as in the published code.
    """
    generator = torch.Generator().manual_seed(seed)
    n, width = features_nD.shape
    batch = min(batch, n)
    n_heads = len(learning_rates)
    first_DC = torch.empty(width, n_classes).normal_(0.0, INITIAL_STD, generator=generator)
    weight = first_DC[:, None, :].expand(width, n_heads, n_classes).reshape(width, -1).clone()
    bias = torch.zeros(n_heads * n_classes)
    speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(learning_rates, dtype=torch.float32).repeat_interleave(n_classes)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(n, generator=generator)
        rows, order = order[:batch], order[batch:]
        x_BD = features_nD[rows]
        error = _logit_gradient(torch.addmm(bias, x_BD, weight), labels_n[rows], n_classes)
        speed.mul_(MOMENTUM).addmm_(x_BD.T, error)
        bias_speed.mul_(MOMENTUM).add_(error.sum(dim=0))
        shrink = (1 + math.cos(math.pi * step / steps)) / 2
        weight.addcmul_(speed, rates, value=-shrink)
        bias.addcmul_(bias_speed, rates, value=-shrink)
    return Heads(weight.reshape(width, n_heads, n_classes), bias.reshape(n_heads, n_classes))


def _logit_gradient(logits: Tensor, labels_B: Tensor, n_classes: int) -> Tensor:
    """d(mean cross-entropy)/d(logits) = (softmax - one-hot) / B, for each head's block of columns [B, H*C]."""
    n = len(logits)
    error_BHC = logits.reshape(n, -1, n_classes).softmax(dim=2)
    error_BHC[torch.arange(n), :, labels_B] -= 1
    return error_BHC.reshape(n, -1).div_(n)
