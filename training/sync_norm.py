"""Batch norm over the images of all processes. torch's own SyncBatchNorm runs on GPUs only.

Axes: B images, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training import parallel


class SyncBatchNorm(_BatchNorm):
    """As nn.BatchNorm1d and 2d, with the mean and variance of the whole batch; gradients flow through both."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of axes will do."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same; in evaluation, or alone, what the original does."""
        if not self.training or parallel.world_size() == 1:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        n = x.numel() // x.shape[1]
        # Each process tells its mean and variance, joined as by Chan et al. 1979: sums of squares would cancel.
        own_2C = torch.stack([x.mean(dim=axes), x.var(dim=axes, correction=0)])
        means_PC, variances_PC = parallel.all_rows(own_2C[None]).unbind(1)
        mean_C = means_PC.mean(dim=0)
        variance_C = variances_PC.mean(dim=0) + (means_PC - mean_C).square().mean(dim=0)
        self._remember(mean_C.detach(), variance_C.detach(), n * parallel.world_size())
        shape = [1, -1, *[1] * (x.ndim - 2)]
        gain_C = self.weight * (variance_C + self.eps).rsqrt()
        return x * gain_C.view(shape) + (self.bias - mean_C * gain_C).view(shape)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor, n: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * (n / max(n - 1, 1)), self.momentum)


def synchronise_(network: nn.Module) -> None:
    """Let every batch norm of a network take its mean and variance over all processes; each process has equally many images."""
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
                one = SyncBatchNorm(module.num_features, module.eps, module.momentum).to(module.weight.device)
                one._parameters, one._buffers = module._parameters, module._buffers
                setattr(parent, name, one.train(module.training))
