"""Several processes that train one network: what they tell each other. Alone, every function leaves things as they are.

`torchrun` starts the processes. Each has its part of every batch; gradients, centres and whatever a loss takes over the batch are those of
all parts together, so that the number of processes does not change what is learned.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from data.errors import InputError


def rank() -> int:
    """Which of the processes this is; 0 leads, and is the only one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's device. NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def part_of(batch_size: int) -> int:
    """Images of a batch that fall to each process. Raises InputError where they cannot be shared evenly."""
    if batch_size % world_size():
        raise InputError(f"a batch of {batch_size} images does not divide among {world_size()} processes")
    return batch_size // world_size()


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes; no gradient flows."""
    if world_size() == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def mean_scalars(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean over all processes of scalars by name."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, (total(stacked) / world_size()).tolist(), strict=True))


def column_log_sum(logits_BK: Tensor) -> Tensor:
    """log of the sum of exp over the rows of all processes, [1, K]; no gradient flows."""
    if world_size() == 1:
        return logits_BK.logsumexp(dim=0, keepdim=True)
    highest_1K = (
        logits_BK.amax(dim=0, keepdim=True) if len(logits_BK) else logits_BK.new_full((1, logits_BK.shape[1]), -1e30)
    )
    dist.all_reduce(highest_1K, dist.ReduceOp.MAX)
    return total((logits_BK - highest_1K).exp().sum(dim=0, keepdim=True)).log() + highest_1K


def all_rows(rows_BD: Tensor) -> Tensor:
    """The rows of all processes, in their order, with gradients; each has equally many."""
    return rows_BD if world_size() == 1 else torch.cat(all_gather(rows_BD.contiguous()))


@torch.no_grad()
def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gathered(value: Any) -> list[Any]:
    """The (picklable) values of all processes, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found
