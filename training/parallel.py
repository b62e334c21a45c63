"""Several processes that train one network: what they tell each other. Alone, every function leaves things as they are.

`torchrun` starts the processes. Each has its part of every batch; gradients, centres and whatever a loss takes over the batch are those of
all parts together, so that the number of processes does not change what is learned.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor

from data.errors import InputError, ToldElsewhere

PATIENCE = timedelta(hours=12)
"""How long processes wait for one another. Process 0 alone measures k-NN and writes, which on large sets takes longer than torch's ten
minutes between GPUs; a process that has died is noticed by torchrun at once."""


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def of_the_first(find: Callable[[], Any]) -> Any:
    """What process 0 finds, in all of them. An InputError of its `find` is raised in every process, and told by process 0 only."""
    found: Any = None
    if rank() == 0:
        try:
            found = find()
        except InputError as error:
            found = error
    # A process that left before the others heard of it would leave each of them with a broken connection to complain about.
    heard = gathered(found)[0]
    if isinstance(heard, InputError):
        raise heard if rank() == 0 else ToldElsewhere(str(heard))
    return heard


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


class GradientAverage:
    """Means of gradients over all processes, computed in buckets while the backward pass still runs.

    Buckets are filled from the last parameter on, which is about the order in which gradients come, and sent in that order, so that all
    processes speak of the same one.
    """

    BUCKET_BYTES = 25 * 2**20

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.buckets: list[list[nn.Parameter]] = [[]]
        room = self.BUCKET_BYTES
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            size = parameter.numel() * parameter.element_size()
            if self.buckets[-1] and size > room:
                self.buckets.append([])
                room = self.BUCKET_BYTES
            self.buckets[-1].append(parameter)
            room -= size
            parameter.register_post_accumulate_grad_hook(self._came)
        self.number = {parameter: i for i, bucket in enumerate(self.buckets) for parameter in bucket}
        self.listening = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Around the backward pass after which gradients are complete; on leaving they are the means."""
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[list[Tensor], Tensor, Any]] = []
        self.listening = True
        yield
        self.listening = False
        while len(self.sent) < len(self.buckets):  # what was not used in this step has no gradient anywhere
            self._send()
        for gradients, flat, work in self.sent:
            if work is not None:
                work.wait()
            means = (flat / world_size()).split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])
        self.sent = []

    def _came(self, parameter: nn.Parameter) -> None:
        if not self.listening:
            return
        self.missing[self.number[parameter]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        gradients = [p.grad for p in self.buckets[len(self.sent)] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) if gradients else torch.empty(0)
        self.sent.append((gradients, flat, dist.all_reduce(flat, async_op=True) if gradients else None))


@contextmanager
def averaged_gradients(network: nn.Module, averager: GradientAverage | None, last: bool) -> Iterator[None]:
    """Around a backward pass: after the `last` one of a step gradients are the means over all processes."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    if averager is None or not last:
        yield
        return
    with averager.listen():
        yield


def shard_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, from the shards of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, [n], of all its shards together."""
    if not tensors:
        return torch.zeros(0)
    found_n = torch.stack(torch._foreach_norm([shard_of(tensor) for tensor in tensors]))
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return found_n
    return total(found_n.square()).sqrt()


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
