"""Parameter groups, gradient clipping and the optimiser of DINO."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW with two groups: weights, which decay, then biases and all 1-D parameters, which do not.

    Learning rate and weight decay are set at each step; see `set_rates_`.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (spared if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def set_rates_(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of the first."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def clip_each_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient tensor on its own to an L2 norm of at most `max_norm`; returns the norm over all before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm > 0:
        factors = torch.clamp(max_norm / (norms + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms.norm()
