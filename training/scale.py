"""How a run is spread over processes and memory. Nothing here changes what is learned, only where it is computed and what it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from backbones.resnet import Bottleneck, ResNet
from backbones.vit import Block, ViT
from data.errors import InputError
from training import parallel
from training.distillation import State
from training.methods import optimizer_of
from training.projection_head import ProjectionHead
from training.recipe import Recipe
from training.sync_norm import synchronise_

BLOCK_METHODS = ("forward", "packed", "cls", "read")
"""The ways through a block."""
NOT_COMPILED = ("read",)
"""How many tokens are read changes from step to step, and with it all shapes."""
WAYS_THROUGH = ("packed", "cls", "read", "packed_features", "packed_read", "scores", "cross_entropy", "encode", "loss")
"""Of blocks, backbones, heads and learners, beside forward."""
COMPILED_VARIANTS = 256
"""Of a block: by crop size, rate of stochastic depth, student or teacher. Above it torch would fall back to eager, silently."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a run is computed; any of it may change when a run is resumed."""

    accumulate: int = 1
    """Parts that each process takes its images of a batch in, one after the other: less memory for the same batch."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each of several processes holds a share of the weights, gradients and optimiser (FSDP2); none: all of them (DDP)."""
    checkpoint_blocks: bool = False
    """Compute the activations of each ViT block again in the backward pass instead of keeping them."""
    compile_blocks: bool = False
    """Compile each ViT block by torch.compile. Sums are then rounded otherwise than without it."""


def spread_(state: State[Any], recipe: Recipe, scale: Scale) -> None:
    """Make the networks of a fresh state ready for `scale`; weights are those they had. Raises InputError for what does not fit."""
    networks = [state.student, state.teacher] + ([state.guide] if isinstance(state.guide, nn.Module) else [])
    blocks = [module for network in networks for module in network.modules() if isinstance(module, Block)]
    if scale.checkpoint_blocks and not blocks:
        raise InputError("--checkpoint-blocks: a ResNet has no blocks to compute again; leave it out")
    if scale.compile_blocks:
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
        wrap_(
            blocks, lambda method: torch.compile(method), [name for name in BLOCK_METHODS if name not in NOT_COMPILED]
        )
    if scale.checkpoint_blocks:
        own = [module for module in state.student.modules() if isinstance(module, Block)]
        wrap_(own, lambda method: partial(checkpoint, method, use_reentrant=False))
    if parallel.world_size() == 1:
        return
    for network in networks:
        synchronise_(network)
        if scale.sharding == "fsdp" and not isinstance(network, FSDPModule):  # several students share one guide
            shard_(network)
    if scale.sharding == "fsdp":
        state.optimizer = optimizer_of(state.student, recipe)
    else:
        state.averager = parallel.GradientAverage(state.student.parameters())


def wrap_(
    blocks: list[Block],
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    ways: Sequence[str] = BLOCK_METHODS,
) -> None:
    """Replace the ways through each block."""
    for block in blocks:
        for name in ways:
            setattr(block, name, wrapper(getattr(block, name)))


def shard_(network: nn.Module) -> None:
    """Share the weights of a network among the processes: by block, by head, and the rest (FSDP2)."""
    for module in network.modules():
        if isinstance(module, Block | Bottleneck | ProjectionHead):
            shard_alone_(module)
    backbone = network.backbone
    assert isinstance(backbone, nn.Module)
    shard_alone_(backbone)
    shard_alone_(network)


def shard_alone_(module: nn.Module) -> None:
    """Share what is not shared yet of a module; it is whole within each of its ways through."""
    # All give their weights back after the forward pass, also the outermost: a teacher has no backward pass that would do it.
    fully_shard(module, reshard_after_forward=True)
    for name in WAYS_THROUGH:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def plain_backbone(network: nn.Module) -> ViT | ResNet | None:
    """A copy of a learner's backbone, on the CPU and whole, for the leading process to save or to measure; None for the others.

    All processes call it. Nothing that is done to the copy changes the run.
    """
    backbone = network.backbone
    assert isinstance(backbone, ViT | ResNet)
    weights = {name: parallel.whole(tensor) for name, tensor in backbone.state_dict().items()}
    if parallel.rank():
        return None
    with torch.device("meta"):
        copy = ViT(backbone.spec) if isinstance(backbone, ViT) else ResNet(backbone.spec)
    copy.load_state_dict({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, assign=True)
    return copy.requires_grad_(False).eval()
