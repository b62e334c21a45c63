"""Parameter groups, gradient clipping and the optimisers."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training import parallel


class Multipliers(NamedTuple):
    """What a parameter makes of the step's rates."""

    lr: float = 1.0
    weight_decay: float = 1.0
    last_layer: bool = False
    """Takes the last layer's learning rate, which is held at 0 in the beginning."""


def dino_multipliers(name: str, parameter: Tensor) -> Multipliers:
    """DINOv1: biases and all 1-D parameters do not decay."""
    return Multipliers(weight_decay=0.0 if name.endswith(".bias") or parameter.ndim == 1 else 1.0)


def dinov2_multipliers(name: str, depth: int, layer_decay: float, patch_embed_lr: float) -> Multipliers:
    """DINOv2: rates fall from the head to the input by `layer_decay` per block; biases, norms and LayerScale do not decay.

    `name` counts from the learner or from the backbone; `patch_embed_lr` multiplies the patch embedding's rate once more.
    """
    part = name.removeprefix("backbone.")
    block = int(part.split(".")[1]) if part.startswith("blocks.") else -1
    at_input = part.startswith(("cls_token", "mask_token", "register_tokens", "pos_embed", "patch_embed"))
    power = depth - block if block >= 0 or at_input else 0
    return Multipliers(
        lr=layer_decay**power * (patch_embed_lr if part.startswith("patch_embed") else 1.0),
        weight_decay=0.0 if part.endswith(".bias") or "norm" in part or "gamma" in part else 1.0,
        last_layer="last_layer" in part,
    )


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate is scaled for each tensor to the ratio of weight to update (You et al. 2017), as DINO uses it.

    1-D tensors are neither decayed nor scaled.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.9, eta: float = 0.001) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """mu <- m mu + scale (g + wd p); p <- p - lr mu."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, update = parallel.shard_of(p), parallel.shard_of(p.grad)
                if p.ndim != 1:
                    update = update.add(weight, alpha=group["weight_decay"])
                    weight_norm, update_norm = self._norms(p, update)
                    scale = torch.where(
                        (weight_norm > 0) & (update_norm > 0), group["eta"] * weight_norm / update_norm, 1.0
                    )
                    update = update * scale
                mu = parallel.shard_of(self.state[p].setdefault("mu", torch.zeros_like(p)))
                mu.mul_(group["momentum"]).add_(update)
                weight.add_(mu, alpha=-group["lr"])

    def _norms(self, p: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Of a weight and of (this process's shard of) its update."""
        if not isinstance(p, DTensor):
            return p.norm(), update.norm()
        squares = torch.stack([parallel.shard_of(p).norm(), update.norm()]).square()
        weight_norm, update_norm = parallel.total(squares).sqrt().unbind()
        return weight_norm, update_norm


def make_optimizer(
    parameters: Iterable[tuple[nn.Parameter, Multipliers]], kind: Literal["adamw", "sgd", "lars"] = "adamw"
) -> torch.optim.Optimizer:
    """An optimiser with one group for each set of multipliers, in order of appearance; frozen parameters are left out.

    Rates are set at each step; see `set_rates_`.
    """
    members: dict[Multipliers, list[nn.Parameter]] = defaultdict(list)
    for parameter, multipliers in parameters:
        if parameter.requires_grad:
            members[multipliers].append(parameter)
    groups: list[dict[str, Any]] = [{"params": found, "multipliers": tuple(key)} for key, found in members.items()]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if kind == "lars":
        return LARS(groups)
    # Fused: one pass over weights, gradients and moments instead of a dozen, which on a CPU is bound by memory.
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def set_rates_(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, last_layer_lr: float) -> None:
    """Give each group its share of the step's rates."""
    for group in optimizer.param_groups:
        multipliers = Multipliers(*group["multipliers"])
        group["lr"] = multipliers.lr * (last_layer_lr if multipliers.last_layer else lr)
        group["weight_decay"] = multipliers.weight_decay * weight_decay


def clip_each_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient tensor on its own to an L2 norm of at most `max_norm`; returns the norm over all before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms_n = parallel.norms(gradients)
    if max_norm > 0:
        factors = torch.clamp(max_norm / (norms_n + 1e-6), max=1.0)
        torch._foreach_mul_([parallel.shard_of(g) for g in gradients], list(factors.unbind()))
    return norms_n.norm()


def clip_together_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients to a common L2 norm of at most `max_norm`, 0 for any; returns the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = parallel.norms(gradients).norm()
    if max_norm > 0:
        torch._foreach_mul_([parallel.shard_of(g) for g in gradients], torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
