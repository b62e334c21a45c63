"""Which tokens of a packed sequence somebody will read: all others may end before the last block does.

A loss reads CLS tokens and perhaps masked patches. In the last block the other tokens matter as keys and values only, so neither their
queries nor their projection and MLP need to be computed.

Axes: B images of a group, T tokens, N patches, R tokens that are read; images are counted over all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from backbones.attention import Shapes


@dataclass(frozen=True)
class Wanted:
    """R tokens of a packed sequence, in its order."""

    images_R: Tensor
    tokens_R: Tensor
    """Place in its image, CLS at 0."""
    cls_only: Sequence[bool]
    """By group: no other token than CLS is read."""

    def rows(self, shapes: Shapes) -> Tensor:
        """Place [R] of each token in the sequence."""
        return _starts(shapes, self.images_R.device)[self.images_R] + self.tokens_R

    def taking(self, shapes: Shapes, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Where a branch runs on the `samples` [n] of each group only: which of the R tokens take it, [r]; their places [r] among the
        rows that `Attention.read` gives of those samples; and what their branch is multiplied by, [r, 1]."""
        device = self.images_R.device
        kept = [
            (len(some), 1 if only else T) for some, (_, T), only in zip(samples, shapes, self.cls_only, strict=True)
        ]
        place = torch.full((sum(B for B, _ in shapes),), -1, device=device)
        gain = torch.ones(len(place), 1, device=device)
        first = list(accumulate((B for B, _ in shapes), initial=0))
        images = torch.cat([some + start for some, start in zip(samples, first, strict=False)])
        place[images] = _starts(kept, device)
        gain[images] = torch.cat([gain.new_full((n, 1), B / n) for (n, _), (B, _) in zip(kept, shapes, strict=True)])
        taking_r = (place[self.images_R] >= 0).nonzero().flatten()
        images_r = self.images_R[taking_r]
        return taking_r, place[images_r] + self.tokens_R[taking_r], gain[images_r]


def wanted_of(shapes: Shapes, patches: Sequence[Tensor | None], n_registers: int, device: torch.device) -> Wanted:
    """CLS of every image, and in each group the patches [B, N] that are True."""
    images, tokens, first = [], [], 0
    for (B, T), chosen_BN in zip(shapes, patches, strict=True):
        read_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        read_BT[:, 0] = True
        if chosen_BN is not None:
            read_BT[:, 1 + n_registers :] = chosen_BN
        image_r, token_r = read_BT.nonzero(as_tuple=True)
        images.append(image_r + first)
        tokens.append(token_r)
        first += B
    return Wanted(torch.cat(images), torch.cat(tokens), [chosen is None for chosen in patches])


def _starts(shapes: Shapes, device: torch.device) -> Tensor:
    """First row [images] of each image in a packed sequence."""
    found, start = [], 0
    for B, T in shapes:
        found.append(start + T * torch.arange(B, device=device))
        start += B * T
    return torch.cat(found)
